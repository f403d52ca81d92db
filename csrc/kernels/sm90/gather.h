#pragma once

// Rows gathered into a stage by cp.async, 16 bytes a thread, by the 128 threads of the producer warpgroup. (One TMA box
// for each row would be far slower: the copy engine works off boxes, not bytes.)

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cp_async.h"
#include "arguments.h"
#include "tile.h"
#include "tile_walker.h"

namespace scattermoe::kernels::sm90 {

// Rows that hold the contraction: a tile keeps its rows from one stage to the next. Thread t copies chunk t % 8 of rows
// t / 8, t / 8 + 16, ... The start of each row is looked up by one thread of the warp that copies it, a tile ahead, so
// that it is there when its turn comes.
template <int kTileM>
class GatheredTileRows {
    static constexpr int kCopies = kTileM / 16;
    static constexpr int kWarpRows = kCopies * 4;  // no more than a warp has lanes
    static_assert(kWarpRows <= kWarpSize);

  public:
    __device__ __forceinline__ explicit GatheredTileRows(const GatheredMatrix& matrix) : matrix_(matrix) {}

    __device__ __forceinline__ void look_ahead(const OutputTile& tile) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int row = lane / 4 * 16 + warp * 4 + lane % 4;
        next_ = matrix_.look_up(tile.row + max(min(row, tile.rows - 1), 0));
    }

    __device__ __forceinline__ void begin_tile() {
        const char* const mine = matrix_.row(next_);
        const int lane = threadIdx.x % kWarpSize;
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
            current_[i] = shuffle(mine, i * 4 + lane / 8) + lane % 8 * 16;
    }

    __device__ __forceinline__ void copy(uint32_t stage, int k_block) const {
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const uint32_t target = stage + first * 128 + (chunk ^ first % 8) * 16;
        const uint32_t offset = k_block * 128;
        if (kStageK * (k_block + 1) <= matrix_.columns) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i)
                ptx::cp_async_16(target + i * 16 * 128, current_[i] + offset);
        } else {
            // The contraction ends within the stage. Weights are zero there too, but zero times what the stage held may
            // be NaN.
            const bool inside = k_block * kStageK + chunk * 8 < matrix_.columns;
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                ptx::cp_async_16(target + i * 16 * 128, inside ? current_[i] + offset : matrix_.rows, inside ? 16 : 0);
            }
        }
    }

  private:
    const GatheredMatrix& matrix_;
    const char* current_[kCopies];
    int32_t next_ = 0;  // slot of the row that this thread looks up, of the tile after
};

// Rows along which the contraction runs: 64 new ones for each stage, of each kExtent columns. A warp copies a quarter
// of a stage's rows; its lanes hold the row numbers of two stages at a time.
template <int kExtent>
class GatheredDepthRows {
    static constexpr int kLanesPerRow = kExtent / 8;
    static constexpr int kRowsPerCopy = kWarpSize / kLanesPerRow;
    static constexpr int kCopies = 16 / kRowsPerCopy;
    static_assert(kExtent == 128 || kExtent == 256);

  public:
    static constexpr int kStagesAtOnce = 2;

    __device__ __forceinline__ explicit GatheredDepthRows(const GatheredMatrix& matrix) : matrix_(matrix) {}

    // The lane's slot for the two stages of a group's rows [begin, begin + depth) that start at row `first` of it; any
    // slot past them.
    __device__ __forceinline__ int32_t look_up(int32_t begin, int32_t depth, int first) const {
        const int lane = threadIdx.x % kWarpSize;
        const int row =
            first + lane / 16 * kStageK + first_row(lane % kRowsPerCopy) + lane % 16 / kRowsPerCopy * kCopyRows;
        return matrix_.look_up(max(begin + min(row, depth - 1), 0));
    }

    // Of the rows that the lanes hold, those that this lane is to copy from, at `column`; `half`: for which of their
    // two stages. Ahead of copy(), so that a free stage is filled at once.
    __device__ __forceinline__ void aim(const char* row_of_lane, int half, int column) {
        const int lane = threadIdx.x % kWarpSize;
        column += lane % kLanesPerRow * 8;
        const uint32_t offset = column < matrix_.columns ? column * 2 : 0;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            source_[i] = shuffle(row_of_lane, half * 16 + i * kRowsPerCopy + lane / kLanesPerRow) + offset;
        }
    }

    // Of rows past the group's last, `depth` rows after the stage's first, zeros are written.
    __device__ __forceinline__ void copy(uint32_t stage, int depth) const {
        const int lane = threadIdx.x % kWarpSize, chunk = lane % kLanesPerRow, first = first_row(lane / kLanesPerRow);
        const uint32_t target = stage + chunk / 8 * (kStageK * 128) + first * 128;
        const int swizzled = (chunk % 8 ^ first % 8) * 16;
        // Rows advance by eight, or by four, which flips one bit of the swizzle.
        const auto place = [&](int i) { return target + i * kCopyRows * 128 + (swizzled ^ i * kCopyRows % 8 * 16); };
        if (depth >= kStageK) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i)
                ptx::cp_async_16(place(i), source_[i]);
        } else {
            __syncwarp();  // a branch, not a predicate on every copy
            const int left = depth - first;
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                ptx::cp_async_16(place(i), source_[i], left > i * kCopyRows ? 16 : 0);
            }
        }
    }

  private:
    // The four warps take rows in turns.
    static constexpr int kCopyRows = 4 * kRowsPerCopy;
    __device__ __forceinline__ static int first_row(int row_in_copy) {
        return threadIdx.x / kWarpSize * kRowsPerCopy + row_in_copy;
    }

    const GatheredMatrix& matrix_;
    const char* source_[kCopies];
};

}  // namespace scattermoe::kernels::sm90
