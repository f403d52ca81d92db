#pragma once

// The product of one tile: copies run kStages - 1 k-blocks ahead of the tensor cores.

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

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

// f<0>(), f<1>(), ...: a loop whose counter is a constant in its body.
template <int kCount, typename F>
__device__ __forceinline__ void static_for(F&& f) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        (f.template operator()<kIndex>(), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

template <typename Element, TileId kTileId, Major kMajorA, Major kMajorB>
struct Mainloop {
    static constexpr GemmTile kTile = tile_shape(kTileId);
    using Warp = WarpTile<kTileId>;
    using TileA = OperandTile<Element, kMajorA, kTile.m, kTile.k_bytes>;
    using TileB = OperandTile<Element, kMajorB, kTile.n, kTile.k_bytes>;
    static constexpr int kSteps = kTile.k_bytes / 32;  // of mma_16x8 in a k-block
    static_assert(kSteps % 2 == 0, "fragments alternate between two buffers");
    static_assert(kTile.stages >= 2);

    static constexpr int kPairs = Warp::kBlocksN / 2;  // of blocks of B that one fragment holds
    static_assert(kSteps * kPairs % 2 == 0);

    // Adds the product of all k-blocks. Shared memory is free for other use after the next __syncthreads().
    //
    // Fragments of B pass by one at a time and are multiplied with all of A's, whose fragments for the next step are
    // read with the last of this one's products still to come.
    template <typename CopyA, typename CopyB>
    __device__ __forceinline__ static void run(Accumulators<kTileId>& sums, uint32_t shared, CopyA& copy_a,
                                               CopyB& copy_b, int k_blocks) {
        const int lane = threadIdx.x % kWarpSize;
        const FragmentReader<Element, kMajorA, kTile.m, kTile.k_bytes, Operand::kA> reader_a(Warp::warp_m(), lane);
        const FragmentReader<Element, kMajorB, kTile.n, kTile.k_bytes, Operand::kB> reader_b(Warp::warp_n(), lane);
        uint32_t a[2][Warp::kBlocksM][4];
        uint32_t b[2][4];
        int issued = 0;
        uint32_t write_stage = shared;
        // Part kPart of the next k-block's copies. Each k-block ends with a commit, whether there is one or not, so
        // that a fixed number of groups is pending.
        auto issue = [&]<int kPart, int kParts, bool kWhole>() {
            if (kWhole || issued < k_blocks) {
                copy_a.template issue<kPart, kParts, kWhole>(write_stage);
                copy_b.template issue<kPart, kParts, kWhole>(write_stage + TileA::kBytes);
            }
            if constexpr (kPart == kParts - 1) {
                write_stage = next_stage(write_stage, shared);
                ++issued;
                ptx::cp_async_commit();
            }
        };
        const int whole_blocks = min(copy_a.whole_blocks(), copy_b.whole_blocks());
#pragma unroll
        for (int stage = 0; stage < kTile.stages - 1; ++stage)
            issue.template operator()<0, 1, false>();
        ptx::cp_async_wait<kTile.stages - 2>();
        __syncthreads();

        uint32_t read_stage = shared;
#pragma unroll
        for (int m = 0; m < Warp::kBlocksM; ++m)
            reader_a.load(a[0][m], read_stage, m, 0);
        reader_b.load(b[0], read_stage + TileA::kBytes, 0, 0);

        // Multiplies one k-block while it issues the copies of the one kStages - 1 later.
        auto multiply = [&]<bool kWhole>() {
            static_for<kSteps>([&]<int kStep>() {
                issue.template operator()<kStep, kSteps, kWhole>();
#pragma unroll
                for (int pair = 0; pair < kPairs; ++pair) {
                    const bool last = pair == kPairs - 1;
                    const int now = (kStep * kPairs + pair) % 2;
                    constexpr int kNextStep = (kStep + 1) % kSteps;
                    if (last && kStep == kSteps - 1) {
                        // Every warp has read its last fragments of this stage, which may be overwritten; the next has
                        // landed.
                        ptx::cp_async_wait<kTile.stages - 2>();
                        __syncthreads();
                        read_stage = next_stage(read_stage, shared);
                    }
                    if (last) {
                        reader_b.load(b[now ^ 1], read_stage + TileA::kBytes, 0, kNextStep);
#pragma unroll
                        for (int m = 0; m < Warp::kBlocksM; ++m) {
                            reader_a.load(a[kNextStep % 2][m], read_stage, m, kNextStep);
                        }
                    } else {
                        reader_b.load(b[now ^ 1], read_stage + TileA::kBytes, pair + 1, kStep);
                    }
#pragma unroll
                    for (int m = 0; m < Warp::kBlocksM; ++m) {
                        ptx::mma_16x8<Element>(sums[m][2 * pair], a[kStep % 2][m], b[now][0], b[now][1]);
                        ptx::mma_16x8<Element>(sums[m][2 * pair + 1], a[kStep % 2][m], b[now][2], b[now][3]);
                    }
                }
            });
        };
        int k_block = 0;
#pragma unroll 1
        for (; k_block + kTile.stages - 1 < whole_blocks; ++k_block)
            multiply.template operator()<true>();
#pragma unroll 1
        for (; k_block < k_blocks; ++k_block)
            multiply.template operator()<false>();
        ptx::cp_async_wait<0>();
    }

  private:
    __device__ __forceinline__ static uint32_t next_stage(uint32_t stage, uint32_t shared) {
        stage += kTile.stage_bytes();
        return stage == shared + kTile.shared_bytes() ? shared : stage;
    }
};

}  // namespace scattermoe::kernels::sm80
