#pragma once

// The product of one tile: copies run kStages - 1 k-blocks ahead of the tensor cores.

#include <cuda_runtime.h>

#include <cstdint>

#include "operand_tile.h"

namespace scattermoe::kernels::sm80 {

// A warp's part of the block's tile.
template <TileId kTileId>
struct WarpTile {
    static constexpr GemmTile kTile = tile_shape(kTileId);
    static constexpr int kM = kTile.m / kTile.warps_m;
    static constexpr int kN = kTile.n / kTile.warps_n;
    static constexpr int kBlocksM = kM / 16;  // of mma_16x8
    static constexpr int kBlocksN = kN / 8;
    static_assert(kM % 16 == 0 && kN % 16 == 0);

    __device__ __forceinline__ static int warp_m() { return threadIdx.x / kWarpSize / kTile.warps_n * kM; }
    __device__ __forceinline__ static int warp_n() { return threadIdx.x / kWarpSize % kTile.warps_n * kN; }
};

// Registers 0, 1 of a block: row lane / 4, columns lane % 4 * 2 and the next; 2, 3: the same columns, eight rows below.
template <TileId kTileId>
using Accumulators = float[WarpTile<kTileId>::kBlocksM][WarpTile<kTileId>::kBlocksN][4];

template <typename Element, TileId kTileId, Major kMajorA, Major kMajorB>
struct Mainloop {
    static constexpr GemmTile kTile = tile_shape(kTileId);
    using Warp = WarpTile<kTileId>;
    using TileA = OperandTile<Element, kMajorA, kTile.m, kTile.k_bytes>;
    using TileB = OperandTile<Element, kMajorB, kTile.n, kTile.k_bytes>;
    static constexpr int kSteps = kTile.k_bytes / 32;  // of mma_16x8 in a k-block
    static_assert(kSteps % 2 == 0, "fragments alternate between two buffers");
    static_assert(kTile.stages >= 2);

    struct Fragments {
        uint32_t a[Warp::kBlocksM][4];
        uint32_t b[Warp::kBlocksN / 2][4];
    };

    // Adds the product of all k-blocks. Shared memory is free for other use after the next __syncthreads().
    template <typename CopyA, typename CopyB>
    __device__ __forceinline__ static void run(Accumulators<kTileId>& sums, uint32_t shared, CopyA& copy_a,
                                               CopyB& copy_b, int k_blocks) {
        const int lane = threadIdx.x % kWarpSize;
        const FragmentReader<Element, kMajorA, kTile.m, kTile.k_bytes, Operand::kA> reader_a(Warp::warp_m(), lane);
        const FragmentReader<Element, kMajorB, kTile.n, kTile.k_bytes, Operand::kB> reader_b(Warp::warp_n(), lane);
        Fragments fragments[2];
        auto read = [&](Fragments& into, uint32_t stage, int step) {
#pragma unroll
            for (int m = 0; m < Warp::kBlocksM; ++m)
                reader_a.load(into.a[m], stage, m, step);
#pragma unroll
            for (int n = 0; n < Warp::kBlocksN / 2; ++n)
                reader_b.load(into.b[n], stage + TileA::kBytes, n, step);
        };
        int issued = 0;
        uint32_t write_stage = shared;
        // One commit for each k-block, there or not, so that a fixed number of groups is pending.
        auto issue = [&] {
            if (issued < k_blocks) {
                copy_a.issue(write_stage);
                copy_b.issue(write_stage + TileA::kBytes);
                write_stage = next_stage(write_stage, shared);
                ++issued;
            }
            ptx::cp_async_commit();
        };

#pragma unroll
        for (int stage = 0; stage < kTile.stages - 1; ++stage)
            issue();
        ptx::cp_async_wait<kTile.stages - 2>();
        __syncthreads();

        uint32_t read_stage = shared;
        read(fragments[0], read_stage, 0);
#pragma unroll 1
        for (int k_block = 0; k_block < k_blocks; ++k_block) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                if (step == kSteps - 1) {
                    // Every warp holds the last fragments of this stage and may let it be overwritten; the next has
                    // landed.
                    ptx::cp_async_wait<kTile.stages - 2>();
                    __syncthreads();
                    read_stage = next_stage(read_stage, shared);
                }
                read(fragments[(step + 1) % 2], read_stage, (step + 1) % kSteps);
                if (step == 0) issue();
                multiply(sums, fragments[step % 2]);
            }
        }
        ptx::cp_async_wait<0>();
    }

  private:
    __device__ __forceinline__ static uint32_t next_stage(uint32_t stage, uint32_t shared) {
        stage += kTile.stage_bytes();
        return stage == shared + kTile.shared_bytes() ? shared : stage;
    }

    __device__ __forceinline__ static void multiply(Accumulators<kTileId>& sums, const Fragments& f) {
#pragma unroll
        for (int m = 0; m < Warp::kBlocksM; ++m) {
#pragma unroll
            for (int n = 0; n < Warp::kBlocksN; ++n) {
                // Back and forth, so that consecutive products share a fragment of B.
                const int column = m % 2 == 0 ? n : Warp::kBlocksN - 1 - n;
                ptx::mma_16x8<Element>(sums[m][column], f.a[m], f.b[column / 2][column % 2 * 2],
                                       f.b[column / 2][column % 2 * 2 + 1]);
            }
        }
    }
};

}  // namespace scattermoe::kernels::sm80
