#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace scattermoe::kernels {

// y[t] = sum_j gates[t, j] * row(t, j). All tensors contiguous.
struct CombineParams {
    DType dtype = DType::kBFloat16;
    const void* rows = nullptr;              // [T * K, H]
    const void* gates = nullptr;             // [T, K], float (double for float64 rows); none means ones
    const int32_t* slot_position = nullptr;  // [T, K]; none: there are no sentinels
    bool grouped = true;                     // row(t, j) is slot_position[t, j], else t * K + j
    void* out = nullptr;                     // [T, H]
    int64_t num_tokens = 0;
    int32_t top_k = 1;
    int64_t hidden = 0;
};

// Rows in grouped order, without gates: what a gradient is the sum of.
inline bool is_plain_sum(const CombineParams& p) {
    return p.grouped && p.slot_position != nullptr && p.gates == nullptr;
}

// Whether every row starts at a multiple of 16 bytes.
inline bool has_aligned_rows(const CombineParams& p) {
    return p.hidden * size_of(p.dtype) % kVectorBytes == 0 && is_vector_aligned(p.rows) && is_vector_aligned(p.out);
}

cudaError_t combine(const CombineParams& params, cudaStream_t stream);

// grad_rows = gates[s] * grad[t], grad_gates[s] = <grad[t], row>; zero for sentinels.
struct CombineBackwardParams {
    DType dtype = DType::kBFloat16;
    const void* grad = nullptr;   // [T, H]
    const void* rows = nullptr;   // [S, H], read for grad_gates alone
    const void* gates = nullptr;  // as above
    const int32_t* slot_order = nullptr;
    const int32_t* slot_position = nullptr;
    bool grouped = true;
    void* grad_rows = nullptr;   // [S, H] or none
    void* grad_gates = nullptr;  // [S], float (double for float64), or none
    int64_t num_slots = 0;
    int32_t top_k = 1;
    int64_t hidden = 0;
};

cudaError_t combine_backward(const CombineBackwardParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
