#include "support.h"

#include <ATen/Context.h>

#include <limits>
#include <sstream>
#include <type_traits>

#include "../../kernels/grouped_gemm.h"

namespace scattermoe::cuda {

kernels::DType kernel_dtype(at::ScalarType dtype) {
    switch (dtype) {
        case at::kBFloat16:
            return kernels::DType::kBFloat16;
        case at::kHalf:
            return kernels::DType::kFloat16;
        case at::kFloat:
            return kernels::DType::kFloat32;
        case at::kDouble:
            return kernels::DType::kFloat64;
        default:
            TORCH_CHECK_TYPE(false, "scattermoe: expected float64, float32, bfloat16 or float16, got ", dtype);
    }
}

void check_launch(const char* op, cudaError_t error, std::initializer_list<NamedTensor> arguments) {
    if (C10_LIKELY(error == cudaSuccess)) return;
    cudaGetLastError();
    std::ostringstream shapes;
    for (const NamedTensor& argument : arguments) {
        if (argument.tensor.defined()) shapes << ", " << argument.name << " " << argument.tensor.sizes();
    }
    const char* const hint =
        error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
            ? "; the library was not built for this GPU: rebuild it with its architecture in TORCH_CUDA_ARCH_LIST"
            : "";
    TORCH_CHECK(false, "scattermoe::", op, ": CUDA error on device ", static_cast<int>(c10::cuda::current_device()),
                shapes.str(), ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")", hint);
}

namespace {

// Reads the setting through a getter that names backend and operator by strings (PyTorch 2.9) or enumerators (newer).
// Context::allowTF32CuBLAS would not do: it raises where the setting was made through the newer of PyTorch's
// interfaces.
template <typename Precision, typename Backend, typename Op>
bool reads_tf32(const at::Context& context, Precision (at::Context::*getter)(Backend, Op) const) {
    using BackendName = std::remove_cvref_t<Backend>;
    using OpName = std::remove_cvref_t<Op>;
    if constexpr (std::is_enum_v<BackendName>) {
        return (context.*getter)(BackendName::CUDA, OpName::MATMUL) == Precision::TF32;
    } else {
        return (context.*getter)("cuda", "matmul") == "tf32";
    }
}

}  // namespace

bool resolve_allow_tf32(std::optional<bool> allow_tf32, at::ScalarType dtype) {
    if (dtype != at::kFloat) return false;
    if (allow_tf32.has_value()) return *allow_tf32;
    return !at::NoTF32Guard::should_disable_tf32() && reads_tf32(at::globalContext(), &at::Context::float32Precision);
}

int32_t size_32(const char* op, const char* name, int64_t size) {
    TORCH_CHECK_VALUE(size <= std::numeric_limits<int32_t>::max(), "scattermoe::", op, ": expected ", name,
                      " < 2^31, got ", size);
    return static_cast<int32_t>(size);
}

bool stride_fits(const at::Tensor& x, int64_t stride) {
    return stride * static_cast<int64_t>(x.element_size()) <= kernels::kMaxRowBytes;
}

at::Tensor with_contiguous_rows(const at::Tensor& x) {
    const bool adjacent = x.stride(1) == 1 || x.size(1) <= 1;
    return adjacent && stride_fits(x, row_stride(x)) ? x : x.contiguous();
}

int64_t row_stride(const at::Tensor& x) {
    return x.size(0) > 1 ? x.stride(0) : x.size(1);
}

at::Tensor compute_gates(const std::optional<at::Tensor>& gates, at::ScalarType rows_dtype) {
    return has_value(gates) ? to_dtype(*gates, compute_dtype(rows_dtype)).contiguous() : at::Tensor();
}

}  // namespace scattermoe::cuda
