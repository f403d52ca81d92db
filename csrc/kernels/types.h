#pragma once

// What host and device code, with or without CUDA headers, agree on.

#include <cstdint>

// Before `constexpr`: callable from device code too where a CUDA compiler reads it.
#if defined(__CUDACC__)
#define SCATTERMOE_HD __host__ __device__
#else
#define SCATTERMOE_HD
#endif

namespace scattermoe::kernels {

enum class DType : int { kBFloat16, kFloat16, kFloat32, kFloat64 };

SCATTERMOE_HD constexpr int size_of(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16:
        case DType::kFloat16:
            return 2;
        case DType::kFloat32:
            return 4;
        case DType::kFloat64:
            return 8;
    }
    return 0;
}

SCATTERMOE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
SCATTERMOE_HD constexpr int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// The widest access to memory that one thread makes, and the alignment that it asks for.
inline constexpr int kVectorBytes = 16;

inline bool is_vector_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

}  // namespace scattermoe::kernels
