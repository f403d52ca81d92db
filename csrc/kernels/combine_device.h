#pragma once

// The sum over a token's slots, for the kernel that does nothing else and for the one that does it beside a product:
// the same additions in the same order.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "combine.h"
#include "vector.h"

namespace scattermoe::kernels {

// f(std::integral_constant<int, n>{}): how many rows of a token are loaded before the first is added. A divisor of
// top_k where one will do, so that no round loads rows that do not count.
#pragma nv_exec_check_disable
template <typename F>
SCATTERMOE_HD auto with_rows_in_flight(int32_t top_k, F&& f) {
    if (top_k <= 2) return f(std::integral_constant<int, 2>{});
    if (top_k <= 4) return f(std::integral_constant<int, 4>{});
    if (top_k % 5 == 0) return f(std::integral_constant<int, 5>{});
    if (top_k % 6 == 0) return f(std::integral_constant<int, 6>{});
    return f(std::integral_constant<int, 8>{});
}

// One thread's share of a token: the vectors of columns thread, thread + threads, ... Nothing branches on what was
// loaded, or each row would wait for the one before: sentinels, and what the last round has too many, load some row and
// do not count. kPlain: is_plain_sum(p), which takes a third less of instructions.
template <typename T, bool kAligned, int kRowsInFlight, bool kPlain>
__device__ __forceinline__ void combine_token(const CombineParams& p, int64_t token, int thread, int threads) {
    using Compute = ComputeType<T>;
    constexpr int kSize = kVectorSize<T, kAligned>;
    using Vec = Vector<T, kSize>;
    const T* const rows = static_cast<const T*>(p.rows);
    const Compute* const gates = static_cast<const Compute*>(p.gates);
    const int64_t first_slot = token * p.top_k;

    for (int64_t column = int64_t{thread} * kSize; column < p.hidden; column += int64_t{threads} * kSize) {
        Compute sum[kSize] = {};
        for (int j0 = 0; j0 < p.top_k; j0 += kRowsInFlight) {
            int32_t row_of[kRowsInFlight];
            Compute weights[kRowsInFlight];
            bool counts[kRowsInFlight];
            Vec values[kRowsInFlight];
#pragma unroll
            for (int i = 0; i < kRowsInFlight; ++i) {
                const int64_t slot = first_slot + min(j0 + i, p.top_k - 1);
                const int32_t position = kPlain || p.slot_position != nullptr ? p.slot_position[slot] : 0;
                counts[i] = j0 + i < p.top_k && position >= 0;
                row_of[i] = kPlain || p.grouped ? max(position, 0) : static_cast<int32_t>(slot);
                weights[i] = kPlain || gates == nullptr ? Compute(1) : gates[slot];
            }
#pragma unroll
            for (int i = 0; i < kRowsInFlight; ++i)
                values[i] = Vec::load_once(rows + row_of[i] * p.hidden + column);
#pragma unroll
            for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
                for (int c = 0; c < kSize; ++c) {
                    // Selected, not multiplied by zero: a sentinel's row and gate may hold NaN.
                    sum[c] += counts[i] ? weights[i] * values[i].get(c) : Compute(0);
                }
            }
        }
        Vec result;
#pragma unroll
        for (int c = 0; c < kSize; ++c)
            result.set(c, sum[c]);
        result.store_whole(static_cast<T*>(p.out) + token * p.hidden + column);
    }
}

}  // namespace scattermoe::kernels
