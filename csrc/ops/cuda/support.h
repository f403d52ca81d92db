#pragma once

// What the CUDA side of every op needs to cross from torch to the kernels.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <initializer_list>
#include <optional>

#include "../../kernels/types.h"
#include "../checks.h"

namespace scattermoe::cuda {

kernels::DType kernel_dtype(at::ScalarType dtype);

// Throws what a launch came back with, naming the op, the shapes and the device. Nothing stays behind in the process:
// the next launch starts clean.
void check_launch(const char* op, cudaError_t error, std::initializer_list<NamedTensor> arguments);

// Whether products of a dtype may round their operands to TF32, which float32 alone can: the caller's word, else what
// PyTorch's own matmul would do.
bool resolve_allow_tf32(std::optional<bool> allow_tf32, at::ScalarType dtype);

// A size that kernels keep in 32 bits.
int32_t size_32(const char* op, const char* name, int64_t size);

// x itself where the elements of a row are adjacent and rows no further apart than kernels can tell, else a copy.
at::Tensor with_contiguous_rows(const at::Tensor& x);

// Whether a stride in elements of x is one that the products can step by.
bool stride_fits(const at::Tensor& x, int64_t stride);

// Elements from one row to the next; of a single row, what a contiguous one would have.
int64_t row_stride(const at::Tensor& x);

// x itself where it has the dtype: Tensor::to would find that out at the price of a call of an operator.
inline at::Tensor to_dtype(const at::Tensor& x, at::ScalarType dtype) {
    return x.scalar_type() == dtype ? x : x.to(dtype);
}

// The gates in the compute dtype of the rows, contiguous, or an undefined tensor for ones.
at::Tensor compute_gates(const std::optional<at::Tensor>& gates, at::ScalarType rows_dtype);

inline const void* data_or_null(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline cudaStream_t current_stream() {
    return c10::cuda::getCurrentCUDAStream().stream();
}

}  // namespace scattermoe::cuda
