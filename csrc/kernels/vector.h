#pragma once

// Short vectors of elements: what one thread loads, computes on and stores in the memory-bound kernels.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ptx/global_memory.h"
#include "types.h"

namespace scattermoe::kernels {

// Sums and elementwise arithmetic run in float32, for float64 in float64.
template <typename T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ __forceinline__ ComputeType<T> to_compute(T value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __bfloat162float(value);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __half2float(value);
    } else {
        return value;
    }
}

template <typename T>
__device__ __forceinline__ T from_compute(ComputeType<T> value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(value);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value);
    } else {
        return value;
    }
}

// Elements in one access: all that fit 16 bytes where rows are aligned, one where they are not.
template <typename T, bool kAligned>
inline constexpr int kVectorSize = kAligned ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;

template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Vector {
    T elements[kSize];

    __device__ __forceinline__ static constexpr int size() { return kSize; }
    __device__ __forceinline__ static Vector load(const T* source) { return *reinterpret_cast<const Vector*>(source); }
    // For rows that stream through: see ptx::load_global_once.
    __device__ __forceinline__ static Vector load_once(const T* source) {
        if constexpr (sizeof(Vector) == kVectorBytes) {
            return __builtin_bit_cast(Vector, ptx::load_global_once(source));
        } else {
            return load(source);
        }
    }
    __device__ __forceinline__ void store(T* target) const { *reinterpret_cast<Vector*>(target) = *this; }
    // In one piece, wherever this is: see ptx::store_global_128.
    __device__ __forceinline__ void store_whole(T* target) const {
        if constexpr (sizeof(Vector) == kVectorBytes) {
            ptx::store_global_128(target, __builtin_bit_cast(uint4, *this));
        } else {
            store(target);
        }
    }
    __device__ __forceinline__ static Vector zero() {
        Vector v;
#pragma unroll
        for (int i = 0; i < kSize; ++i)
            v.elements[i] = from_compute<T>(0);
        return v;
    }
    __device__ __forceinline__ ComputeType<T> get(int i) const { return to_compute(elements[i]); }
    __device__ __forceinline__ void set(int i, ComputeType<T> value) { elements[i] = from_compute<T>(value); }
};

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// The same result in every lane, always in the same order of additions.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}

// Whether every row of a contiguous matrix starts at a multiple of a vector, its first one being aligned.
template <typename T>
bool rows_aligned(int64_t columns) {
    return columns * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
}

// A block of at most 256 threads that covers `vectors` columns of as many rows as fit: x walks a row, y the rows.
inline constexpr int kRowBlockThreads = 256;

inline dim3 row_block(int64_t vectors) {
    const int x = static_cast<int>(std::min<int64_t>(round_up(vectors, kWarpSize), kRowBlockThreads));
    return dim3(x, kRowBlockThreads / x);
}

}  // namespace scattermoe::kernels
