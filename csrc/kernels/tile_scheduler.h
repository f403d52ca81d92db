#pragma once

// Which tile a block computes. Offsets stay on the device, so the grid is an upper bound of the tiles there can be:
// blocks past the last tile return at once. The hardware hands blocks out in order, which balances ragged groups by
// itself.

#include <cuda_runtime.h>

#include <cstdint>

#include "fast_divider.h"
#include "types.h"
#include "vector.h"

namespace scattermoe::kernels {

// Tiles run down `kBand` row tiles before the next column of tiles: what runs at one time then reads about as many rows
// of one operand as of the other, and both fit L2.
inline constexpr int kBand = 16;

struct TileIndex {
    int m;
    int n;
};

// 2^32 / d, rounded up, for d > 1.
SCATTERMOE_HD constexpr uint32_t reciprocal_32(uint32_t d) {
    return UINT32_MAX / d + 1;
}

// n / rows for 0 <= n < 2^28 and 0 < rows <= kBand.
__device__ __forceinline__ int divide_by_band_rows(int n, int rows) {
    static_assert(kBand == 16);
    static constexpr uint32_t kReciprocals[kBand + 1] = {
        0,
        0,  // of one, which does not fit
        reciprocal_32(2),
        reciprocal_32(3),
        reciprocal_32(4),
        reciprocal_32(5),
        reciprocal_32(6),
        reciprocal_32(7),
        reciprocal_32(8),
        reciprocal_32(9),
        reciprocal_32(10),
        reciprocal_32(11),
        reciprocal_32(12),
        reciprocal_32(13),
        reciprocal_32(14),
        reciprocal_32(15),
        reciprocal_32(16),
    };
    return rows == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), kReciprocals[rows]));
}

// by_tiles_n: divides by tiles_n.
__device__ __forceinline__ TileIndex banded_order(int index, int tiles_m, int tiles_n, const FastDivider& by_tiles_n) {
    const int band = by_tiles_n.divide(index / kBand), rest = index - band * (kBand * tiles_n);
    const int rows = min(kBand, tiles_m - band * kBand);
    const int column = divide_by_band_rows(rest, rows);
    return {band * kBand + rest - column * rows, column};
}

// For who asks once.
__device__ __forceinline__ TileIndex banded_order(int index, int tiles_m, int tiles_n) {
    const int band_size = kBand * tiles_n;
    const int band = index / band_size, rest = index % band_size;
    const int rows = min(kBand, tiles_m - band * kBand);
    return {band * kBand + rest % rows, rest / rows};
}

// Part of the rows of one group: an expert's, or those of the sentinels, whose "expert" is num_experts.
struct GroupTile {
    int expert;
    int32_t row_begin;  // grouped positions
    int32_t row_end;
    int n;  // tile of columns
};

inline int64_t max_row_tiles(int64_t num_slots, int64_t num_experts, int tile_m) {
    const int64_t groups = num_experts + 1 < num_slots ? num_experts + 1 : num_slots;
    return num_slots / tile_m + groups;
}

// Finds the block's tile; false if there are fewer. Called by all threads; uses shared memory of its own.
template <int kTileM, int kThreads>
__device__ __forceinline__ bool find_group_tile(const int32_t* expert_offsets, int num_experts, int32_t num_slots,
                                                int tiles_n, GroupTile& tile) {
    constexpr int kWarps = kThreads / kWarpSize;
    __shared__ int32_t warp_totals[kWarps];
    __shared__ int4 found;  // expert, begin, end, index of the block's tile within the group
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row_tile = blockIdx.x / tiles_n;  // counted over all groups as if each row of tiles were done at a time

    int before = 0;  // row tiles of the experts before this round's
    bool done = false;
    for (int first = 0; !done; first += kThreads) {
        const int expert = first + threadIdx.x;
        // The round after the last expert is left to the sentinels.
        int32_t begin = 0, end = 0;
        if (expert <= num_experts) {
            begin = expert_offsets[expert];
            end = expert < num_experts ? expert_offsets[expert + 1] : num_slots;
        }
        const int tiles = (end - begin + kTileM - 1) / kTileM;
        int inclusive = tiles;
#pragma unroll
        for (int offset = 1; offset < kWarpSize; offset *= 2) {
            const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
            if (lane >= offset) inclusive += other;
        }
        if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
        __syncthreads();
        int total = 0;
        int exclusive = before + inclusive - tiles;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            exclusive += w < warp ? warp_totals[w] : 0;
            total += warp_totals[w];
        }
        if (row_tile >= exclusive && row_tile < exclusive + tiles) {
            found = make_int4(expert, begin, end, static_cast<int>(blockIdx.x - int64_t{exclusive} * tiles_n));
        }
        before += total;
        const bool inside = row_tile < before;
        done = inside || first + kThreads > num_experts;
        __syncthreads();
        if (done && !inside) return false;
    }
    const int4 group = found;
    const TileIndex index = banded_order(group.w, (group.z - group.y + kTileM - 1) / kTileM, tiles_n);
    tile.expert = group.x;
    tile.row_begin = group.y + index.m * kTileM;
    tile.row_end = min(tile.row_begin + kTileM, group.z);
    tile.n = index.n;
    return true;
}

}  // namespace scattermoe::kernels
