#pragma once

// out[e] = left_e^T right_e: the contraction runs over an expert's rows, of which there may be any number. Both
// operands lie with the contraction across rows, in memory and in shared memory; either may be gathered.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/fence.h"
#include "../ptx/named_barrier.h"
#include "../ptx/setmaxnreg.h"
#include "../ptx/tma.h"
#include "arguments.h"
#include "epilogue.h"
#include "gather.h"
#include "mainloop.h"
#include "pipeline.h"

namespace scattermoe::kernels::sm90 {

// A tile of one expert's gradient and the rows that it is the sum over.
struct DepthTile {
    int expert;
    int32_t begin;  // grouped position
    int32_t depth;
    int row;     // of the output, in tiles
    int column;  // likewise

    __device__ __forceinline__ int k_blocks() const { return (depth + kStageK - 1) / kStageK; }
};

__device__ __forceinline__ bool find_tile(const WeightGradArguments& p, int number, DepthTile& tile) {
    const int tiles = p.tiles_m * p.tiles_n;
    tile.expert = number / tiles;
    if (tile.expert >= p.num_experts) return false;
    const TileIndex index = banded_order(number - tile.expert * tiles, p.tiles_m, p.tiles_n);
    tile.row = index.m;
    tile.column = index.n;
    tile.begin = __ldg(p.expert_offsets + tile.expert);
    tile.depth = __ldg(p.expert_offsets + tile.expert + 1) - tile.begin;
    return true;
}

template <typename Element, Tile kTile, GatheredSide kGathered>
struct WeightGrad {
    using Arguments = WeightGradArguments;
    using Loop = Mainloop<Element, kTile, Major::kMn, Major::kMn>;
    using Layout = SharedLayout<kTile>;
    using Ring = Pipeline<Layout::kStages>;
    using Position = typename Ring::Position;
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr bool kGathers = kGathered != GatheredSide::kNeither;
    static constexpr bool kLeftInOrder = kGathered != GatheredSide::kLeft;
    static constexpr bool kRightInOrder = kGathered != GatheredSide::kRight;
    static constexpr int kBulkBytes = (kLeftInOrder ? kShape.a_bytes() : 0) + (kRightInOrder ? kShape.b_bytes() : 0);
    static constexpr int kBlockBytes = kStageK * 128;  // 64 rows of 64 columns

    // Starts the bulk copies of a stage: boxes of 64 columns, zero past the matrix's last.
    __device__ __forceinline__ static void load_in_order(const Arguments& p, const Ring& ring, const Position& at,
                                                         uint32_t shared, const DepthTile& tile, int k_block) {
        const uint32_t full = ring.full(at.stage);
        const int first = tile.begin + k_block * kStageK;
        ptx::mbarrier_arrive_expect_bytes(full, kBulkBytes);
        if constexpr (kLeftInOrder) {
#pragma unroll
            for (int block = 0; block < kShape.m / 64; ++block) {
                ptx::tma_load(shared + at.stage * kShape.a_bytes() + block * kBlockBytes, p.left_map, full,
                              tile.row * kShape.m + block * 64, first);
            }
        }
        if constexpr (kRightInOrder) {
#pragma unroll
            for (int block = 0; block < kShape.n / 64; ++block) {
                ptx::tma_load(shared + Layout::kB + at.stage * kShape.b_bytes() + block * kBlockBytes, p.right_map,
                              full, tile.column * kShape.n + block * 64, first);
            }
        }
    }

    // One thread.
    __device__ __forceinline__ static void load(const Arguments& p, const Ring& ring, uint32_t shared) {
        Position at;
        DepthTile tile;
        for (int number = blockIdx.x; find_tile(p, number, tile); number += gridDim.x) {
            for (int k_block = 0; k_block < tile.k_blocks(); ++k_block) {
                ring.wait_empty(at);
                load_in_order(p, ring, at, shared, tile, k_block);
                at.advance();
            }
        }
    }

    // Groups of stages, one tile's after the other's, past experts without rows: what row numbers are looked up for at
    // once.
    template <int kStagesAtOnce>
    struct StageGroups {
        const Arguments& p;
        int number;
        int k_block = 0;
        DepthTile tile;
        bool more;

        __device__ __forceinline__ explicit StageGroups(const Arguments& arguments) : p(arguments), number(blockIdx.x) {
            more = find_tile(p, number, tile);
            skip_empty();
        }
        __device__ __forceinline__ void next() {
            k_block += kStagesAtOnce;
            skip_empty();
        }

      private:
        __device__ __forceinline__ void skip_empty() {
            while (more && k_block >= tile.k_blocks()) {
                k_block = 0;
                number += gridDim.x;
                more = find_tile(p, number, tile);
            }
        }
    };

    // The whole warpgroup; row numbers are looked up a group of stages ahead.
    __device__ __forceinline__ static void load_gathered(const Arguments& p, const Ring& ring, uint32_t shared) {
        constexpr bool kLeft = kGathered == GatheredSide::kLeft;
        constexpr int kExtent = kLeft ? kShape.m : kShape.n;
        constexpr int kOffset = kLeft ? 0 : Layout::kB;
        constexpr int kStageBytes = kLeft ? kShape.a_bytes() : kShape.b_bytes();
        using DepthRows = GatheredDepthRows<kExtent>;
        DepthRows rows(p.gathered);
        Position at;
        StageGroups<DepthRows::kStagesAtOnce> ahead(p);
        int32_t slot_ahead = 0;
        const auto look_up = [&] {
            if (ahead.more) slot_ahead = rows.look_up(ahead.tile.begin, ahead.tile.depth, ahead.k_block * kStageK);
        };
        look_up();
        while (ahead.more) {
            const DepthTile tile = ahead.tile;
            const int first_k_block = ahead.k_block;
            const char* const row_of_lane = p.gathered.row(slot_ahead);
            ahead.next();
            look_up();
            const int column = (kLeft ? tile.row : tile.column) * kExtent;
#pragma unroll
            for (int half = 0; half < DepthRows::kStagesAtOnce; ++half) {
                const int k_block = first_k_block + half;
                if (k_block >= tile.k_blocks()) break;
                rows.aim(row_of_lane, half, column);
                ring.wait_empty(at);
                if (threadIdx.x == 0) load_in_order(p, ring, at, shared, tile, k_block);
                rows.copy(shared + kOffset + at.stage * kStageBytes, tile.depth - k_block * kStageK);
                ptx::mbarrier_arrive_after_cp_async(ring.full(at.stage));
                at.advance();
            }
        }
    }

    // Bulk copies bring whatever rows follow an expert's last. Those of both operands must be zero: zero times a NaN is
    // NaN.
    __device__ __forceinline__ static void zero_tail(uint32_t shared, int stage, int depth, int consumer) {
        constexpr int kWriters = kShape.ping_pong ? kWarpgroupThreads : kConsumers * kWarpgroupThreads;
        const int thread =
            static_cast<int>(threadIdx.x) - kWarpgroupThreads - (kShape.ping_pong ? consumer * kWriters : 0);
        const auto zero_rows = [&](uint32_t operand, int blocks) {
            for (int block = 0; block < blocks; ++block) {
                for (int chunk = depth * 8 + thread; chunk < kStageK * 8; chunk += kWriters) {
                    ptx::store_shared_64(operand + block * kBlockBytes + chunk * 16, 0, 0);
                    ptx::store_shared_64(operand + block * kBlockBytes + chunk * 16 + 8, 0, 0);
                }
            }
        };
        if constexpr (kLeftInOrder) zero_rows(shared + stage * kShape.a_bytes(), kShape.m / 64);
        if constexpr (kRightInOrder) zero_rows(shared + Layout::kB + stage * kShape.b_bytes(), kShape.n / 64);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync<kWriters>(static_cast<int>(NamedBarrier::kTail) + (kShape.ping_pong ? consumer : 0));
    }

    __device__ __forceinline__ static void multiply(const Arguments& p, const Ring& ring, uint32_t shared) {
        using Store = StagedStore<Element, kStoreColumns, kShape.staging_buffers>;
        const ConsumerWarp<kTile> warp;
        Store store(warp.staging(shared + Layout::kStaging));
        typename Loop::Sums sums;
        Position at;
        uint32_t turn = Ring::first_turn(warp.consumer);
        int number = blockIdx.x;
        DepthTile tile, next;
        bool more = find_tile(p, number, tile);
        const auto look_ahead = [&] {
            number += gridDim.x;
            more = find_tile(p, number, next);
        };
        if (kShape.ping_pong && warp.consumer == 1 && more) {
            at.advance(tile.k_blocks());
            look_ahead();
            tile = next;
        }
        while (more) {
            const int k_blocks = tile.k_blocks();
            if constexpr (kShape.ping_pong) ring.wait_turn(warp.consumer, turn);
            const auto hand_over = [&] {
                if constexpr (kShape.ping_pong) ring.pass_turn(warp.consumer, warp.lane);
                look_ahead();
            };
            if (k_blocks > 0) {
                Loop::run(
                    sums, ring, at, shared, warp.consumer, k_blocks,
                    [&](int k_block, int stage) {
                        if constexpr (kGathers) ptx::fence_proxy_async();
                        const int depth = tile.depth - k_block * kStageK;
                        if (depth < kStageK) zero_tail(shared, stage, depth, warp.consumer);
                    },
                    hand_over);
            } else {
                hand_over();
#pragma unroll
                for (int block = 0; block < kShape.consumer_blocks(); ++block) {
#pragma unroll
                    for (int i = 0; i < kShape.n / 2; ++i)
                        sums[block][i] = 0.0f;
                }
            }
            write(p, sums, warp, store, tile);
            if (kShape.ping_pong && more) {  // the other's tile
                at.advance(next.k_blocks());
                look_ahead();
            }
            tile = next;
        }
        Store::drain();
    }

    // The copy engine leaves out rows and columns past the matrix's last.
    template <typename Store>
    __device__ __forceinline__ static void write(const Arguments& p, const typename Loop::Sums& sums,
                                                 const ConsumerWarp<kTile>& warp, Store& store, const DepthTile& tile) {
#pragma unroll
        for (int block = 0; block < kShape.consumer_blocks(); ++block) {
            const int row = tile.row * kShape.m + warp.row(block);
            if (row >= p.m) continue;
            const float (&s)[kShape.n / 2] = sums[block];
#pragma unroll
            for (int part = 0; part < kShape.n / 64; ++part) {
                const int column = tile.column * kShape.n + part * 64;
                if (column >= p.n) break;
                store.stage([&](int j) {
                    const int i = (part * 8 + j) * 4;
                    return make_uint2(pack<Element>(s[i], s[i + 1]), pack<Element>(s[i + 2], s[i + 3]));
                });
                store.send(p.out_map, column, row, tile.expert);
            }
        }
    }
};

template <typename Element, Tile kTile, GatheredSide kGathered>
__global__ void __launch_bounds__(kThreads, 1) weight_grad_kernel(const __grid_constant__ WeightGradArguments p) {
    using Grad = WeightGrad<Element, kTile, kGathered>;
    constexpr RegisterBudget kBudget = register_budget(Grad::kGathers, false);
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const uint32_t shared = opaque_address(dynamic_shared);
    const typename Grad::Ring ring(shared + Grad::Layout::kBarriers);
    if (threadIdx.x == 0) ring.init(Grad::kGathers ? 1 + kWarpgroupThreads : 1, Grad::kShape.ping_pong);
    __syncthreads();
    if (threadIdx.x < kWarpgroupThreads) {
        ptx::setmaxnreg_decrease<kBudget.producer>();
        if constexpr (Grad::kGathers) {
            Grad::load_gathered(p, ring, shared);
        } else if (threadIdx.x == 0) {
            Grad::load(p, ring, shared);
        }
    } else {
        ptx::setmaxnreg_increase<kBudget.consumer>();
        Grad::multiply(p, ring, shared);
    }
}

}  // namespace scattermoe::kernels::sm90
