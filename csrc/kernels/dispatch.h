#pragma once

// Runtime values to compile-time ones, on the host.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "types.h"

namespace scattermoe::kernels {

template <typename T>
struct TypeTag {
    using type = T;
};

// f(TypeTag<T>{}) -> cudaError_t for the element type of a dtype.
template <typename F>
cudaError_t dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kBFloat16:
            return f(TypeTag<__nv_bfloat16>{});
        case DType::kFloat16:
            return f(TypeTag<__half>{});
        case DType::kFloat32:
            return f(TypeTag<float>{});
        case DType::kFloat64:
            return f(TypeTag<double>{});
    }
    return cudaErrorInvalidValue;
}

// f(std::bool_constant<value>{}) -> cudaError_t.
template <typename F>
cudaError_t dispatch_bool(bool value, F&& f) {
    return value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace scattermoe::kernels
