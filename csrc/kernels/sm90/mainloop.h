#pragma once

// What a consumer warpgroup does with the stages of a tile.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/wgmma.h"
#include "../select.h"
#include "../vector.h"
#include "pipeline.h"

namespace scattermoe::kernels::sm90 {

// An operand's part of a stage, 128-byte swizzled. Contraction contiguous (kK): a row of 64 of it for each m or n. The
// other way round (kMn): for each 64 of m or n, a row of those for each of the 64 steps of the contraction.
template <Major kMajor>
struct StageOperand {
    static constexpr uint32_t kBlockBytes = 64 * 128;  // 64 of m or n
    static constexpr uint32_t kAtomBytes = 8 * 128;
    static constexpr uint32_t kLeadingBytes = kMajor == Major::kK ? 16 : kBlockBytes;
    // Descriptors count 16 bytes.
    static constexpr uint32_t kNextBlock = kBlockBytes / 16;
    static constexpr uint32_t kNext16 = (kMajor == Major::kK ? 32 : 16 * 128) / 16;  // of the contraction

    static constexpr uint32_t kHigh = ptx::wgmma_descriptor_high(kAtomBytes);
    __device__ __forceinline__ static uint32_t descriptor(uint32_t shared) {
        return ptx::wgmma_descriptor_low(shared, kLeadingBytes);
    }
};

// kColumns: of the tile that one wgmma multiplies. All of them read the rows' side least often; but accumulators of one
// instruction cannot be more than the registers that a thread has at launch.
template <typename Element, Tile kTile, Major kMajorA, Major kMajorB, int kColumns = tile_shape(kTile).n>
struct Mainloop {
    static constexpr TileShape kShape = tile_shape(kTile);
    static_assert(kShape.n % kColumns == 0 && kColumns % 64 == 0);
    static constexpr int kBlocks = kShape.consumer_blocks();
    using Layout = SharedLayout<kTile>;
    using Ring = Pipeline<Layout::kStages, kShape.paired>;
    using Position = typename Ring::Position;
    using A = StageOperand<kMajorA>;
    using B = StageOperand<kMajorB>;
    using Sums = float[kBlocks][kShape.n / 2];

    // Sums of a tile over its k_blocks > 0 stages. prepare(k_block, stage) runs between a stage's arrival and its
    // products, meanwhile() when those of any but the first have been issued, before_drain() when the last have
    // been, and are not finished. The first stage is not part of the loop: an `if` around the wait in there would make
    // ptxas wait for every product at once.
    // kActive: how many of the warpgroup's blocks of 64 rows are multiplied, kWidth: how many columns.
    template <int kActive = kBlocks, int kWidth = kShape.n, typename Prepare, typename Meanwhile, typename BeforeDrain>
    __device__ __forceinline__ static void run(Sums& sums, const Ring& ring, Position& at, uint32_t shared,
                                               int consumer, int k_blocks, Prepare&& prepare, Meanwhile&& meanwhile,
                                               BeforeDrain&& before_drain) {
        const int lane = threadIdx.x % kWarpSize;
        uint32_t a = A::descriptor(shared + (kShape.ping_pong ? 0 : consumer * kBlocks * A::kBlockBytes));
        uint32_t b = B::descriptor(shared + Layout::kB);
        // The compiler would else derive them anew for each stage. A shuffle it cannot repeat.
        a = __shfl_sync(kFullWarp, a, 0);
        b = __shfl_sync(kFullWarp, b, 0);
        constexpr int kAtOnce = kWidth < kColumns ? kWidth : kColumns;
        auto multiply = [&](int k_block, bool accumulate) {
            // Known to be the same in all lanes, it lets the addresses be added up once for the warp.
            const int stage = __shfl_sync(kFullWarp, at.stage, 0);
            ring.wait_full(at);
            prepare(k_block, at.stage);
            const uint32_t a_stage = a + stage * (kShape.a_bytes() / 16);
            const uint32_t b_stage = b + stage * (kShape.b_bytes() / 16);
            ptx::wgmma_fence();
#pragma unroll
            for (int step = 0; step < kStageK / 16; ++step) {
#pragma unroll
                for (int block = 0; block < kActive; ++block) {
#pragma unroll
                    for (int column = 0; column < kWidth; column += kAtOnce) {
                        ptx::wgmma<Element, kMajorA, kMajorB, A::kHigh, B::kHigh, kAtOnce>(
                            reinterpret_cast<float (&)[kAtOnce / 2]>(sums[block][column / 2]),
                            a_stage + block * A::kNextBlock + step * A::kNext16,
                            b_stage + column / 64 * B::kNextBlock + step * B::kNext16, accumulate || step > 0);
                    }
                }
            }
            ptx::wgmma_commit();
        };

        multiply(0, false);
        int previous = at.stage;
        at.advance();
#pragma unroll 1
        for (int k_block = 1; k_block < k_blocks; ++k_block) {
            multiply(k_block, true);
            ptx::wgmma_wait<1>();
            ring.release(previous, lane);
            previous = at.stage;
            at.advance();
            meanwhile();
        }
        before_drain();
        ptx::wgmma_wait<0>();
        ring.release(previous, lane);
    }

    // The same of no rows at all.
    __device__ __forceinline__ static void skip(const Ring& ring, Position& at, int k_blocks) {
        for (int k_block = 0; k_block < k_blocks; ++k_block) {
            ring.wait_full(at);
            ring.release(at.stage, threadIdx.x % kWarpSize);
            at.advance();
        }
    }
};

}  // namespace scattermoe::kernels::sm90
