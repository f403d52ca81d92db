#pragma once

// out[rows(p)] = in[rows(p)] W[e]^T: tile walker x mainloop x epilogue, one warpgroup that loads and two that multiply.

#include <cuda_runtime.h>

#include <cstdint>

#include "../dependent_launch.h"
#include "../ptx/elect.h"
#include "../ptx/fence.h"
#include "../ptx/setmaxnreg.h"
#include "../ptx/tma.h"
#include "arguments.h"
#include "gather.h"
#include "mainloop.h"
#include "pipeline.h"
#include "tile_queue.h"
#include "tile_walker.h"

namespace scattermoe::kernels::sm90 {

template <typename Element, Tile kTile, Rows kRows, Major kWeightMajor, typename Epilogue>
struct GroupedGemm {
    using Arguments = GroupedGemmArguments<typename Epilogue::Arguments>;
    using Loop = Mainloop<Element, kTile, Major::kK, kWeightMajor>;
    using Layout = SharedLayout<kTile>;
    using Ring = typename Loop::Ring;
    using Queue = TileQueue<OutputTile, tile_shape(kTile).paired>;
    using Walker = TileWalker<tile_shape(kTile).m, tile_shape(kTile).paired>;
    using Position = typename Ring::Position;
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr bool kGathers = kRows == Rows::kGathered;
    static constexpr int kHalves = Epilogue::kHalves;
    static_assert(kHalves == 1 || kWeightMajor == Major::kK);

    // Boxes of at most 256 rows of the weight, or of 64 columns.
    __device__ __forceinline__ static void load_weight(const Arguments& p, uint32_t stage, uint32_t full,
                                                       const OutputTile& tile, int k) {
        if constexpr (kShape.paired) {
            load_half_weight(p, stage, full, tile, k, ptx::cluster_rank());
        } else if constexpr (kWeightMajor == Major::kK) {
            constexpr int kBoxRows = kShape.n / kHalves;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                ptx::tma_load(stage + half * kBoxRows * 128, p.weight_map, full, k, tile.column * kBoxRows,
                              half ^ p.first_half, tile.expert);
            }
        } else {
#pragma unroll
            for (int block = 0; block < kShape.n / 64; ++block) {
                ptx::tma_load(stage + block * kStageK * 128, p.weight_map, full, tile.column * kShape.n + block * 64, k,
                              tile.expert);
            }
        }
    }

    // One block's part of what both of a pair multiply by.
    __device__ __forceinline__ static void load_half_weight(const Arguments& p, uint32_t stage, uint32_t full,
                                                            const OutputTile& tile, int k, int rank) {
        if constexpr (kWeightMajor == Major::kK) {
            constexpr int kBoxRows = kShape.n / kPair;
            const int row = kHalves == 2 ? tile.column * kBoxRows : (tile.column * kPair + rank) * kBoxRows;
            ptx::tma_load_multicast(stage + rank * kBoxRows * 128, p.weight_map, full, kPairMask, k, row,
                                    kHalves == 2 ? rank ^ p.first_half : 0, tile.expert);
        } else {
            constexpr int kBoxes = kShape.n / 64 / kPair;
#pragma unroll
            for (int i = 0; i < kBoxes; ++i) {
                const int block = rank * kBoxes + i;
                ptx::tma_load_multicast(stage + block * kStageK * 128, p.weight_map, full, kPairMask,
                                        tile.column * kShape.n + block * 64, k, tile.expert);
            }
        }
    }

    // One warp; its first lane starts the copies.
    __device__ __forceinline__ static void load_in_order(const Arguments& p, const Ring& ring, Queue queue,
                                                         uint32_t shared) {
        Walker walker(p.expert_offsets, p.num_experts, p.tiles_n, p.by_tiles_n);
        Position at;
        OutputTile tile;
        int i = 0;
        for (; walker.seek(queue.number(i), tile); ++i) {
            if (ptx::elect()) {
                queue.begin(i);
                queue.publish_tile(i, tile);
                for (int k_block = 0; k_block < p.k_blocks; ++k_block) {
                    ring.wait_empty(at);
                    const uint32_t full = ring.full(at.stage);
                    ptx::mbarrier_arrive_expect_bytes(full, kShape.stage_bytes());
                    ptx::tma_load(shared + at.stage * kShape.a_bytes(), p.in_map, full, k_block * kStageK, tile.row);
                    load_weight(p, shared + Layout::kB + at.stage * kShape.b_bytes(), full, tile, k_block * kStageK);
                    at.advance();
                }
            }
            __syncwarp();
        }
        if (ptx::elect()) {
            queue.end(i);
            queue.publish_no_tile(i);
        }
    }

    // The whole warpgroup. A stage is full when each thread's copies have landed, and the weight's bytes.
    __device__ __forceinline__ static void load_gathered(const Arguments& p, const Ring& ring, Queue queue,
                                                         uint32_t shared) {
        Walker walker(p.expert_offsets, p.num_experts, p.tiles_n, p.by_tiles_n);
        GatheredTileRows<kShape.m> rows(p.in);
        Position at;
        OutputTile next;
        int i = 0;
        bool more;
        const auto seek_next = [&] {
            more = walker.seek(queue.number(i), next);
            if (threadIdx.x == 0) more ? queue.publish_tile(i, next) : queue.publish_no_tile(i);
            if (more) rows.look_ahead(next);
        };
        seek_next();
        while (more) {
            const OutputTile tile = next;
            if (threadIdx.x == 0) queue.begin(i);
            rows.begin_tile();
            ++i;
            seek_next();
            for (int k_block = 0; k_block < p.k_blocks; ++k_block) {
                ring.wait_empty(at);
                const uint32_t full = ring.full(at.stage);
                if (threadIdx.x < kWarpSize && ptx::elect()) {
                    ptx::mbarrier_arrive_expect_bytes(full, kShape.b_bytes());
                    load_weight(p, shared + Layout::kB + at.stage * kShape.b_bytes(), full, tile, k_block * kStageK);
                }
                rows.copy(shared + at.stage * kShape.a_bytes(), k_block);
                ptx::mbarrier_arrive_after_cp_async(full);
                at.advance();
            }
            if constexpr (Epilogue::kHasInput) {
                const int stages = Epilogue::stages(p.epilogue, tile);
                for (int part = 0; part < stages; ++part) {
                    ring.wait_empty(at);
                    const uint32_t full = ring.full(at.stage);
                    if (threadIdx.x < kWarpSize && ptx::elect())
                        Epilogue::load(p.epilogue, tile, part, shared, at.stage, full);
                    ptx::mbarrier_arrive(full);
                    at.advance();
                }
            }
        }
        if (threadIdx.x == 0) queue.end(i);
    }

    __device__ __forceinline__ static void multiply(const Arguments& p, const Ring& ring, const Queue& queue,
                                                    uint32_t shared) {
        const int consumer = threadIdx.x / kWarpgroupThreads - 1, lane = threadIdx.x % kWarpSize;
        Epilogue epilogue(p.epilogue, shared + Layout::kStaging);
        Position at;
        // Writes of the gathering threads reach the tensor cores only through a fence on this side of the barrier.
        const auto prepare = [&]([[maybe_unused]] int k_block, int) {
            if constexpr (kGathers) ptx::fence_proxy_async();
            if constexpr (Epilogue::kHasInput) {
                if (k_block == 0) epilogue.settle(ring);
            }
        };
        const auto store_rest = [&] {
            if constexpr (Epilogue::kHolds) {
                while (epilogue.store_next()) {
                }
            }
        };
        typename Loop::Sums sums;
        OutputTile tile;
        // An expert's last tile may have no rows in its second half.
        if constexpr (kShape.ping_pong) {
            const auto meanwhile = [] {};
            const auto pass_turn = [&] { ring.pass_turn(consumer, lane); };
            uint32_t turn = Ring::first_turn(consumer);
            if (consumer == 1) at.advance(p.k_blocks);
            for (int i = consumer; queue.tile(i, tile); i += kConsumers) {
                ring.wait_turn(consumer, turn);
                if (Epilogue::kCrowded || tile.rows > kShape.m / 2) {
                    Loop::run(sums, ring, at, shared, consumer, p.k_blocks, prepare, meanwhile, pass_turn);
                } else {
                    Loop::template run<Loop::kBlocks / 2>(sums, ring, at, shared, consumer, p.k_blocks, prepare,
                                                          meanwhile, pass_turn);
                }
                epilogue.store(sums, tile);
                at.advance(p.k_blocks);  // the other's tile
            }
        } else {
            const auto meanwhile = [&] {
                if constexpr (Epilogue::kHolds) epilogue.store_next();
            };
            int i = 0;
            bool more = queue.tile(i, tile);
            if (more) epilogue.look_ahead(tile);
            while (more) {
                OutputTile next;
                const auto seek_next = [&] {
                    more = queue.tile(++i, next);
                    if (more) epilogue.look_ahead(next);
                };
                epilogue.begin();
                if (consumer * (kShape.m / kConsumers) >= tile.rows) {
                    if constexpr (Epilogue::kHasInput) {
                        epilogue.settle(ring);
                        Loop::skip(ring, at, p.k_blocks + Epilogue::stages(p.epilogue, tile));
                    } else {
                        Loop::skip(ring, at, p.k_blocks);
                    }
                    seek_next();
                } else if constexpr (Epilogue::kHasInput) {
                    if (Epilogue::columns(p.epilogue, tile) > kShape.n / 2) {
                        Loop::run(sums, ring, at, shared, consumer, p.k_blocks, prepare, meanwhile, seek_next);
                        epilogue.template run<kShape.n>(sums, tile, ring, at, shared);
                    } else {
                        // Sums of their own: where two loops have the same, ptxas waits for every product.
                        typename Loop::Sums half;
                        Loop::template run<Loop::kBlocks, kShape.n / 2>(half, ring, at, shared, consumer, p.k_blocks,
                                                                        prepare, meanwhile, seek_next);
                        epilogue.template run<kShape.n / 2>(half, tile, ring, at, shared);
                    }
                } else {
                    Loop::run(sums, ring, at, shared, consumer, p.k_blocks, prepare, meanwhile, seek_next);
                    store_rest();
                    if constexpr (Epilogue::kHolds) {
                        if (!epilogue.hold(sums, tile)) epilogue.store(sums, tile);
                    } else {
                        epilogue.store(sums, tile);
                    }
                }
                tile = next;
            }
            store_rest();
        }
        epilogue.finish(__ldg(p.expert_offsets + p.num_experts), p.num_slots);
    }
};

template <typename Element, Tile kTile, Rows kRows, Major kWeightMajor, typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmArguments<typename Epilogue::Arguments> p) {
    using Gemm = GroupedGemm<Element, kTile, kRows, kWeightMajor, Epilogue>;
    constexpr RegisterBudget kBudget = register_budget(Gemm::kGathers, Epilogue::kCrowded);
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const uint32_t shared = opaque_address(dynamic_shared);
    const typename Gemm::Ring ring(shared + Gemm::Layout::kBarriers);
    const typename Gemm::Queue queue(shared + Gemm::Layout::kQueue, p.tile_counter);
    if (threadIdx.x == 0) {
        ring.init(Gemm::kGathers ? 1 + kWarpgroupThreads : 1, Gemm::kShape.ping_pong);
        queue.init();
    }
    sync_block<kTile>();
    begin_dependent();
    if (threadIdx.x < kWarpgroupThreads) {
        ptx::setmaxnreg_decrease<kBudget.producer>();
        if constexpr (Gemm::kGathers) {
            Gemm::load_gathered(p, ring, queue, shared);
        } else if (threadIdx.x < kWarpSize) {
            Gemm::load_in_order(p, ring, queue, shared);
        }
    } else {
        ptx::setmaxnreg_increase<kBudget.consumer>();
        Gemm::multiply(p, ring, queue, shared);
    }
    leave_block<kTile>();
}

}  // namespace scattermoe::kernels::sm90
