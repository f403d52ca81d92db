#pragma once

// Which tile a number stands for: what each of the producer's warps finds out for itself, and the consumers read from
// the queue (tile_queue.h).

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cluster.h"
#include "../tile_scheduler.h"
#include "../vector.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

// Part of one expert's rows by part of the columns.
struct OutputTile {
    int expert;
    int32_t row;   // grouped position of the first
    int32_t rows;  // that are the expert's: more than a tile has where others follow, 0 only in one of a pair
    int column;    // tile of columns

    // What one of a pair has of a tile of twice kTileM rows: half, of full ones kTileM; or none.
    template <int kTileM>
    __device__ __forceinline__ void take_part(int rank) {
        const int first = rows > kTileM ? kTileM : kTileM / 2;
        if (rank == 0) {
            rows = min(rows, first);
        } else {
            rows = max(rows - first, 0);
            row += rows > 0 ? first : 0;
        }
    }
};

// Turns ascending tile numbers into tiles, for any number of experts without a table: lane l of the warp stands for
// expert w + l of a window of experts and holds how many tiles there are up to its end, so that a ballot finds a
// number's expert. Windows only go forward.
template <int kTileM, bool kPaired = false>
class TileWalker {
    static constexpr int kRows = kTileM * (kPaired ? kPair : 1);  // of a number's tile, a pair's together

  public:
    __device__ __forceinline__ TileWalker(const int32_t* expert_offsets, int num_experts, int tiles_n,
                                          const FastDivider& by_tiles_n)
        : expert_offsets_(expert_offsets), num_experts_(num_experts), tiles_n_(tiles_n), by_tiles_n_(by_tiles_n) {
        load_window(0);
    }

    // False past the last tile. All lanes of the warp call it together, with a number that does not fall.
    __device__ __forceinline__ bool seek(int number, OutputTile& tile) {
        for (;;) {
            const int window_end = __shfl_sync(kFullWarp, tiles_, kWarpSize - 1);
            if (number < window_end) break;
            window_ += kWarpSize;
            if (window_ >= num_experts_) return false;
            load_window(window_end);
        }
        const int owner = __popc(__ballot_sync(kFullWarp, tiles_ <= number));
        const int end_tile = __shfl_sync(kFullWarp, tiles_, owner);
        tile.expert = window_ + owner;
        // Read again rather than held: who gathers has no register to spare.
        const int32_t begin = __ldg(expert_offsets_ + tile.expert), end = __ldg(expert_offsets_ + tile.expert + 1);
        const int tiles_m = row_tiles(begin, end);
        const TileIndex index = banded_order(number - (end_tile - tiles_m * tiles_n_), tiles_m, tiles_n_, by_tiles_n_);
        tile.row = begin + index.m * kRows;
        tile.rows = end - tile.row;
        tile.column = index.n;
        if constexpr (kPaired) tile.take_part<kTileM>(ptx::cluster_rank());
        return true;
    }

  private:
    __device__ __forceinline__ static int row_tiles(int32_t begin, int32_t end) {
        return (end - begin + kRows - 1) / kRows;
    }

    __device__ __forceinline__ void load_window(int tiles_before) {
        const int lane = threadIdx.x % kWarpSize, expert = window_ + lane;
        tiles_ = 0;
        if (expert < num_experts_) {
            tiles_ = row_tiles(__ldg(expert_offsets_ + expert), __ldg(expert_offsets_ + expert + 1)) * tiles_n_;
        }
#pragma unroll
        for (int offset = 1; offset < kWarpSize; offset *= 2) {
            const int other = __shfl_up_sync(kFullWarp, tiles_, offset);
            if (lane >= offset) tiles_ += other;
        }
        tiles_ += tiles_before;
    }

    const int32_t* expert_offsets_;
    int num_experts_;
    int tiles_n_;
    const FastDivider& by_tiles_n_;
    int window_ = 0;  // its first expert
    int tiles_;       // of all experts up to the lane's, its own among them
};

}  // namespace scattermoe::kernels::sm90
