#pragma once

// The two products everything is made of, on rows in grouped order that lie anywhere.

#include <cuda_runtime.h>

#include <cstdint>

#include "combine.h"
#include "fast_divider.h"
#include "types.h"

namespace scattermoe::kernels {

// Rows of an operand may lie at most this far apart; more is an invalid argument.
inline constexpr int64_t kMaxRowBytes = INT32_MAX;

// Where the row of a grouped position lies: at the position itself (top_k one), at its slot, or (divided by top_k) at
// its token.
struct RowMap {
    const int32_t* slot_order = nullptr;  // none: rows are in grouped order
    FastDivider top_k;

    // In two halves, so that the load can run ahead of its use.
    __device__ __forceinline__ int32_t fetch(int32_t position) const {
        return slot_order == nullptr ? position : slot_order[position];
    }
    __device__ __forceinline__ int32_t resolve(int32_t fetched) const { return top_k.divide(fetched); }

    __device__ __forceinline__ int32_t operator()(int32_t position) const { return resolve(fetch(position)); }
};

// out[rows(p), :] = in[rows(p), :] W[e]^T + bias[e] for every grouped position p of expert e; zero for sentinels.
struct GroupedGemmParams {
    DType dtype = DType::kBFloat16;
    bool allow_tf32 = false;
    const void* in = nullptr;  // rows of k elements, contiguous within a row
    int64_t in_stride = 0;     // in elements, like every stride
    RowMap in_rows;
    const void* weight = nullptr;  // [E, n, k] with either of the last two contiguous
    int64_t weight_expert_stride = 0;
    int64_t weight_n_stride = 0;
    int64_t weight_k_stride = 0;
    const void* bias = nullptr;  // [E, n] contiguous, or none
    void* out = nullptr;         // rows of n elements, contiguous within a row
    int64_t out_stride = 0;
    RowMap out_rows;
    const int32_t* expert_offsets = nullptr;  // [E + 1]
    int32_t num_experts = 0;
    int32_t num_slots = 0;
    int32_t n = 0;
    int32_t k = 0;
    int32_t* tile_counter = nullptr;  // holds 0, for this launch alone; or none, which is slower where it is asked for
};

// Whether the kernel that the product takes asks for a tile_counter; out may be none.
bool counts_tiles(const GroupedGemmParams& params);

cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

// out[e] = sum over the grouped positions p of expert e of left[rows(p), :]^T right[rows(p), :]; zero without any.
struct WeightGradParams {
    DType dtype = DType::kBFloat16;
    bool allow_tf32 = false;
    const void* left = nullptr;  // rows of m elements
    int64_t left_stride = 0;
    RowMap left_rows;
    const void* right = nullptr;  // rows of n elements
    int64_t right_stride = 0;
    RowMap right_rows;
    void* out = nullptr;  // [E, m, n], n contiguous
    int64_t out_expert_stride = 0;
    int64_t out_stride = 0;
    const int32_t* expert_offsets = nullptr;  // [E + 1]
    // Whether a kernel was launched since the one that wrote the offsets: they can be read while it still runs.
    bool offsets_are_old = false;
    // Whether one was launched since those that wrote left and right, and whatever is done with the memory of out was
    // launched before that one: nothing but `beside` has to wait for it (dependent_launch.h).
    bool operands_are_old = false;
    int32_t num_experts = 0;
    int32_t num_slots = 0;
    int32_t m = 0;
    int32_t n = 0;
    int32_t* tile_counter = nullptr;  // as above
    // A sum to be computed as well, in the same kernel where that can be, else by a launch of its own.
    const CombineParams* beside = nullptr;
};

bool counts_tiles(const WeightGradParams& params);

// Whether the kernel that the product takes can compute a sum beside it: a plain one, of rows of the product's dtype
// that start at multiples of 16 bytes. out may be none.
bool combines_beside(const WeightGradParams& params);

cudaError_t weight_grad(const WeightGradParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
