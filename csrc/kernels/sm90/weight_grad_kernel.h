#pragma once

// out[e] = left_e^T right_e: the contraction runs over an expert's rows, of which there may be any number. Both
// operands lie with the contraction across rows, in memory and in shared memory; either may be gathered. Memory is
// nearly idle meanwhile: a helper may sum rows over the slots of tokens (combine.h), which needs little else.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../combine_device.h"
#include "../dependent_launch.h"
#include "../ptx/elect.h"
#include "../ptx/fence.h"
#include "../ptx/named_barrier.h"
#include "../ptx/setmaxnreg.h"
#include "../ptx/shared_memory.h"
#include "../ptx/tma.h"
#include "arguments.h"
#include "epilogue.h"
#include "gather.h"
#include "mainloop.h"
#include "pipeline.h"
#include "tile_queue.h"

namespace scattermoe::kernels::sm90 {

// A tile of one expert's gradient and the rows that it is the sum over.
struct DepthTile {
    int expert;
    int32_t begin;  // grouped position
    int32_t depth;
    int row;     // of the output, in tiles
    int column;  // likewise
    int half;    // of its columns: 0 or 1, or kAll

    static constexpr int kAll = -1;
    // In columns.
    template <int kTileN>
    __device__ __forceinline__ int first_column() const {
        return column * kTileN + (half > 0 ? kTileN / 2 : 0);
    }

    // One at least, of zeros where there are no rows.
    __device__ __forceinline__ int k_blocks() const { return max((depth + kStageK - 1) / kStageK, 1); }
};

// Tiles in the order of their numbers: an expert's one after the other, experts with many rows first. Their tiles take
// longest, and what is left for the end should be short. With kSplits a tile that alone would take longer than all of
// them on all blocks has two numbers, one for each half of its columns.
template <int kPairM, int kPairN, bool kSplits>
class DepthTiles {
  public:
    // `order`: shared memory for the experts' order. All `threads` of the block call it together; `scratch` is free
    // again afterwards, for the copy engine too.
    __device__ __forceinline__ DepthTiles(const WeightGradArguments& arguments, int threads, uint32_t order,
                                          uint32_t scratch)
        : p(arguments), order_(order) {
        if (!is_ordered()) return;
        const auto rows = [&](int expert) {
            return __ldg(p.expert_offsets + expert + 1) - __ldg(p.expert_offsets + expert);
        };
        // The same number of rounds for all threads, or the compiler would take them to be apart ever after.
        const int padded = (p.num_experts + 3) / 4 * 4;
        for (int first = 0; first < padded; first += threads) {
            const int expert = first + static_cast<int>(threadIdx.x);
            if (expert < padded) ptx::store_shared_32(scratch + expert * 4, expert < p.num_experts ? rows(expert) : -1);
        }
        __syncthreads();
        for (int first = 0; first < p.num_experts; first += threads) {
            const int expert = first + static_cast<int>(threadIdx.x);
            const int mine = rows(min(expert, p.num_experts - 1));
            int before = 0;
            for (int other = 0; other < padded; other += 4) {
                const uint4 four = ptx::load_shared_128(scratch + other * 4);
                const int theirs[4] = {static_cast<int>(four.x), static_cast<int>(four.y), static_cast<int>(four.z),
                                       static_cast<int>(four.w)};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    before += theirs[i] > mine || (theirs[i] == mine && other + i < expert);
            }
            if (expert < p.num_experts) ptx::store_shared_16(order_ + before * 2, expert);
        }
        ptx::fence_proxy_async();
        if constexpr (kSplits) {
            __syncthreads();
            const float total = static_cast<float>(__ldg(p.expert_offsets + p.num_experts));
            const float limit = total * static_cast<float>(p.tiles_m * p.tiles_n) / static_cast<float>(gridDim.x);
            const int place = threadIdx.x % kWarpSize;  // in the order: more than so many are not split
            const float depth =
                static_cast<float>(rows(ptx::load_shared_16(order_ + min(place, p.num_experts - 1) * 2)));
            const bool is_long = place < p.num_experts && depth > limit;
            long_experts_ = __popc(__ballot_sync(kFullWarp, is_long));
        }
    }

    // False past the last. The whole warp asks.
    __device__ __forceinline__ bool find(int number, DepthTile& tile) const {
        const int tiles_m = (p.tiles_m + kPairM - 1) / kPairM, tiles_n = (p.tiles_n + kPairN - 1) / kPairN;
        const int tiles = tiles_m * tiles_n;
        tile.half = DepthTile::kAll;
        if constexpr (kSplits) {
            const int halves = 2 * long_experts_ * tiles;
            if (number < halves) {
                tile.half = number % 2;
                number /= 2;
            } else {
                number -= halves / 2;
            }
        }
        const int place = p.by_tiles.divide(number);
        if (place >= p.num_experts) return false;
        tile.expert = place;
        if (is_ordered()) {
            tile.expert = __reduce_max_sync(kFullWarp, ptx::load_shared_16(order_ + place * 2));
        }
        const TileIndex index = banded_order(number - place * tiles, tiles_m, tiles_n, p.by_tiles_n);
        const int rank = kPairM * kPairN == 1 ? 0 : ptx::cluster_rank();
        tile.row = index.m * kPairM + (kPairM == 1 ? 0 : rank);
        tile.column = index.n * kPairN + (kPairN == 1 ? 0 : rank);
        tile.begin = __ldg(p.expert_offsets + tile.expert);
        tile.depth = __ldg(p.expert_offsets + tile.expert + 1) - tile.begin;
        return true;
    }

  private:
    __device__ __forceinline__ bool is_ordered() const { return p.num_experts <= kMaxOrderedExperts; }

    const WeightGradArguments& p;
    uint32_t order_;
    int long_experts_ = 0;  // the first of the order, whose tiles are split
};

template <typename Element, Tile kTile, GatheredSide kGathered, GradVariant kVariant>
struct WeightGrad {
    using Arguments = WeightGradArguments;
    static constexpr bool kCombines = kVariant == GradVariant::kBesideSum;
    using Loop = Mainloop<Element, kTile, Major::kMn, Major::kMn, kCombines ? 128 : tile_shape(kTile).n>;
    using Layout = SharedLayout<kTile>;
    using Ring = typename Loop::Ring;
    using Position = typename Ring::Position;
    using Queue = TileQueue<DepthTile, tile_shape(kTile).paired>;
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr bool kSharesLeft = kShape.pair_n() > 1, kSharesRight = kShape.pair_m() > 1;
    // The columns are split where they are the wide side and come in order.
    static constexpr bool kSplits = !kShape.ping_pong && kShape.n == 256 && kGathered != GatheredSide::kRight;
    using Tiles = DepthTiles<kShape.pair_m(), kShape.pair_n(), kSplits>;
    static constexpr bool kGathers = kGathered != GatheredSide::kNeither;
    static constexpr bool kLeftInOrder = kGathered != GatheredSide::kLeft;
    static constexpr bool kRightInOrder = kGathered != GatheredSide::kRight;
    static constexpr int kBulkBytes = (kLeftInOrder ? kShape.a_bytes() : 0) + (kRightInOrder ? kShape.b_bytes() : 0);
    static constexpr int kBlockBytes = kStageK * 128;  // 64 rows of 64 columns

    // Of a shared operand, each of a pair loads half the boxes for both.
    template <bool kShared, int kBoxes>
    __device__ __forceinline__ static void load_box(int block, uint32_t operand, const CUtensorMap& map, uint32_t full,
                                                    int column, int row) {
        const uint32_t target = operand + block * kBlockBytes;
        if constexpr (!kShared) {
            ptx::tma_load(target, map, full, column + block * 64, row);
        } else if (block / (kBoxes / kPair) == ptx::cluster_rank()) {
            ptx::tma_load_multicast(target, map, full, kPairMask, column + block * 64, row);
        }
    }

    // Starts the bulk copies of a stage: boxes of 64 columns, zero past the matrix's last.
    __device__ __forceinline__ static void load_in_order(const Arguments& p, const Ring& ring, const Position& at,
                                                         uint32_t shared, const DepthTile& tile, int k_block) {
        const uint32_t full = ring.full(at.stage);
        const int first = tile.begin + k_block * kStageK;
        const bool all = !kSplits || tile.half == DepthTile::kAll;
        ptx::mbarrier_arrive_expect_bytes(full, all ? kBulkBytes : kBulkBytes - kShape.b_bytes() / 2);
        if constexpr (kLeftInOrder) {
#pragma unroll
            for (int block = 0; block < kShape.m / 64; ++block) {
                load_box<kSharesLeft, kShape.m / 64>(block, shared + at.stage * kShape.a_bytes(), p.left_map, full,
                                                     tile.row * kShape.m, first);
            }
        }
        if constexpr (kRightInOrder) {
            const uint32_t operand = shared + Layout::kB + at.stage * kShape.b_bytes();
            const int column = tile.template first_column<kShape.n>();
            if (all) {
                load_right<kShape.n / 64>(p, operand, full, column, first);
            } else {
                load_right<kShape.n / 128>(p, operand, full, column, first);
            }
        }
    }

    template <int kBoxes>
    __device__ __forceinline__ static void load_right(const Arguments& p, uint32_t operand, uint32_t full, int column,
                                                      int row) {
#pragma unroll
        for (int block = 0; block < kBoxes; ++block)
            load_box<kSharesRight, kBoxes>(block, operand, p.right_map, full, column, row);
    }

    // One warp; its first lane starts the copies.
    __device__ __forceinline__ static void load(const Arguments& p, const Ring& ring, const Tiles& tiles, Queue queue,
                                                uint32_t shared) {
        Position at;
        DepthTile tile;
        int i = 0;
        for (; tiles.find(queue.number(i), tile); ++i) {
            if (ptx::elect()) {
                queue.begin(i);
                queue.publish_tile(i, tile);
                for (int k_block = 0; k_block < tile.k_blocks(); ++k_block) {
                    ring.wait_empty(at);
                    load_in_order(p, ring, at, shared, tile, k_block);
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

    // Groups of stages, one tile's after the other's: what row numbers are looked up for at once.
    template <int kStagesAtOnce>
    struct StageGroups {
        const Tiles& tiles;
        Queue& queue;
        int i = 0;
        int k_block = 0;
        DepthTile tile;
        bool more;

        __device__ __forceinline__ StageGroups(const Tiles& all, Queue& numbers) : tiles(all), queue(numbers) {
            enter();
        }
        __device__ __forceinline__ void next() {
            k_block += kStagesAtOnce;
            if (k_block < tile.k_blocks()) return;
            k_block = 0;
            ++i;
            enter();
        }

      private:
        __device__ __forceinline__ void enter() {
            more = tiles.find(queue.number(i), tile);
            if (threadIdx.x == 0) {
                if (more) {
                    queue.begin(i);
                    queue.publish_tile(i, tile);
                } else {
                    queue.end(i);
                    queue.publish_no_tile(i);
                }
            }
            __syncwarp();
        }
    };

    // The whole warpgroup; row numbers are looked up a group of stages ahead.
    __device__ __forceinline__ static void load_gathered(const Arguments& p, const Ring& ring, const Tiles& tiles,
                                                         Queue queue, uint32_t shared) {
        constexpr bool kLeft = kGathered == GatheredSide::kLeft;
        constexpr int kExtent = kLeft ? kShape.m : kShape.n;
        constexpr int kOffset = kLeft ? 0 : Layout::kB;
        constexpr int kStageBytes = kLeft ? kShape.a_bytes() : kShape.b_bytes();
        using DepthRows = GatheredDepthRows<kExtent>;
        DepthRows rows(p.gathered);
        Position at;
        StageGroups<DepthRows::kStagesAtOnce> ahead(tiles, queue);
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
                if (threadIdx.x < kWarpSize && ptx::elect()) load_in_order(p, ring, at, shared, tile, k_block);
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
        int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads - (kShape.ping_pong ? consumer * kWriters : 0);
        // Nothing of this is to be worked out for stages that have no tail.
        asm volatile("" : "+r"(thread), "+r"(depth));
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

    __device__ __forceinline__ static void multiply(const Arguments& p, const Ring& ring, const Queue& queue,
                                                    uint32_t shared) {
        using Store = StagedStore<Element, kStoreColumns, kShape.staging_buffers>;
        const ConsumerWarp<kTile> warp;
        Store store(warp.staging(shared + Layout::kStaging));
        typename Loop::Sums sums;
        Position at;
        uint32_t turn = Ring::first_turn(warp.consumer);
        int i = 0;
        DepthTile tile, next;
        bool more = queue.tile(i, tile);
        const auto look_ahead = [&] { more = queue.tile(++i, next); };
        if (kShape.ping_pong && warp.consumer == 1 && more) {
            at.advance(tile.k_blocks());
            look_ahead();
            tile = next;
        }
        while (more) {
            if constexpr (kShape.ping_pong) ring.wait_turn(warp.consumer, turn);
            const auto compute = [&](auto& products, auto columns) {
                Loop::template run<Loop::kBlocks, columns.value>(
                    products, ring, at, shared, warp.consumer, tile.k_blocks(),
                    [&](int k_block, int stage) {
                        if constexpr (kGathers) ptx::fence_proxy_async();
                        const int depth = tile.depth - k_block * kStageK;
                        if (depth < kStageK) zero_tail(shared, stage, depth, warp.consumer);
                    },
                    /*meanwhile=*/[] {},
                    [&] {
                        if constexpr (kShape.ping_pong) ring.pass_turn(warp.consumer, warp.lane);
                        look_ahead();
                    });
                if constexpr (kVariant == GradVariant::kTransposed) {
                    write_transposed<columns.value>(p, products, warp, shared + Layout::kStaging, tile);
                } else {
                    write<columns.value>(p, products, warp, store, tile);
                }
            };
            if (!kSplits || tile.half == DepthTile::kAll) {
                compute(sums, std::integral_constant<int, kShape.n>{});
            } else if constexpr (kSplits) {
                // Sums of their own: where two loops have the same, ptxas waits for every product.
                typename Loop::Sums half;
                compute(half, std::integral_constant<int, kShape.n / 2>{});
            }
            if (kShape.ping_pong && more) {  // the other's tile
                at.advance(next.k_blocks());
                look_ahead();
            }
            tile = next;
        }
        Store::drain();
    }

    // The copy engine leaves out rows and columns past the matrix's last.
    template <int kColumns, typename Store>
    __device__ __forceinline__ static void write(const Arguments& p, const typename Loop::Sums& sums,
                                                 const ConsumerWarp<kTile>& warp, Store& store, const DepthTile& tile) {
#pragma unroll
        for (int block = 0; block < kShape.consumer_blocks(); ++block) {
            const int row = tile.row * kShape.m + warp.row(block);
            if (row >= p.m) continue;
            const float (&s)[kShape.n / 2] = sums[block];
#pragma unroll
            for (int part = 0; part < kColumns / 64; ++part) {
                const int column = tile.template first_column<kShape.n>() + part * 64;
                if (column >= p.n) break;
                store.stage([&](int j) {
                    const int i = (part * 8 + j) * 4;
                    return make_uint2(pack<Element>(s[i], s[i + 1]), pack<Element>(s[i + 2], s[i + 3]));
                });
                store.send(p.out_map, column, row, tile.expert);
            }
        }
    }

    // Rows of the tile are columns of the output: a warpgroup's 64, of 64 of the tile's columns at a time, are turned
    // on their way to staging buffers that its warps have in common.
    template <int kColumns>
    __device__ __forceinline__ static void write_transposed(const Arguments& p, const typename Loop::Sums& sums,
                                                            const ConsumerWarp<kTile>& warp, uint32_t staging,
                                                            const DepthTile& tile) {
        static_assert(kShape.consumer_blocks() == 1 && !kShape.ping_pong && kShape.staging_buffers == 2);
        constexpr int kBytes = 64 * 128;  // 64 rows of 64 columns
        const auto meet = [&] {
            ptx::named_barrier_sync<kWarpgroupThreads>(static_cast<int>(NamedBarrier::kStore) + warp.consumer);
        };
        const int first_row = tile.row * kShape.m + warp.consumer * 64;
        if (first_row >= p.m) return;
        const auto sends = [&] { return ptx::elect() && warp.warp == 0; };
        const float (&s)[kShape.n / 2] = sums[0];
        // Of the four matrices that a warp turns at a time, those of the lane's address.
        const int matrix = warp.lane / 8, row = matrix / 2 * 8 + warp.lane % 8;
        const int chunk = (warp.warp * 2 + matrix % 2) ^ warp.lane % 8;
#pragma unroll
        for (int part = 0; part < kColumns / 64; ++part) {
            const int first_column = tile.template first_column<kShape.n>() + part * 64;
            if (first_column >= p.n) break;
            const uint32_t buffer = staging + (warp.consumer * 2 + part % 2) * kBytes;
            if (sends()) ptx::tma_store_wait_read<1>();
            meet();
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const int i = (part * 8 + j) * 4;
                ptx::stmatrix_x4_transposed(buffer + (j * 8 + row) * 128 + chunk * 16, pack<Element>(s[i], s[i + 1]),
                                            pack<Element>(s[i + 2], s[i + 3]), pack<Element>(s[i + 4], s[i + 5]),
                                            pack<Element>(s[i + 6], s[i + 7]));
            }
            ptx::fence_proxy_async();
            meet();
            if (sends()) {
                ptx::tma_store(p.out_map, buffer, first_row, first_column, tile.expert);
                ptx::tma_store_commit();
            }
        }
    }
};

// The helper's tokens: a warp takes one after the other, each as wide as it is.
template <typename Element>
__device__ __forceinline__ void combine_tokens(const CombineParams& p) {
    constexpr int kWarps = kWarpgroupThreads / kWarpSize;
    const int warp = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x % kWarpgroupThreads / kWarpSize;
    const int warps = static_cast<int>(gridDim.x) * kWarps;
    with_rows_in_flight(p.top_k, [&](auto rows_in_flight) {
        for (int64_t token = warp; token < p.num_tokens; token += warps) {
            combine_token<Element, /*kAligned=*/true, rows_in_flight.value, /*kPlain=*/true>(
                p, token, threadIdx.x % kWarpSize, kWarpSize);
        }
    });
}

// Each role is one branch, with the registers that it needs.
template <typename Element, Tile kTile, GatheredSide kGathered, GradVariant kVariant>
__global__ void __launch_bounds__(block_threads(kVariant == GradVariant::kBesideSum), 1)
    weight_grad_kernel(const __grid_constant__ WeightGradArguments p) {
    using Grad = WeightGrad<Element, kTile, kGathered, kVariant>;
    constexpr bool kCombines = Grad::kCombines;
    constexpr auto kBudget = [] {
        if constexpr (kCombines) {
            return kCombiningWeightGradBudget;
        } else {
            return Grad::kGathers ? kGatheringWeightGradBudget : register_budget(/*gathers=*/false, /*crowded=*/false);
        }
    }();
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const uint32_t shared = opaque_address(dynamic_shared);
    const typename Grad::Ring ring(shared + Grad::Layout::kBarriers);
    const typename Grad::Queue queue(shared + Grad::Layout::kQueue, p.tile_counter);
    if (!p.offsets_are_old) begin_dependent();
    const typename Grad::Tiles tiles(p, block_threads(kCombines), shared + shared_bytes(kTile), shared);
    if (threadIdx.x == 0) {
        ring.init(Grad::kGathers ? 1 + kWarpgroupThreads : 1, Grad::kShape.ping_pong);
        queue.init();
    }
    sync_block<kTile>();
    if (p.operands_are_old) {
        begin_beside();
    } else if (p.offsets_are_old) {
        begin_dependent();
    }
    if (threadIdx.x < kWarpgroupThreads) {
        ptx::setmaxnreg_decrease<kBudget.producer>();
        if constexpr (Grad::kGathers) {
            Grad::load_gathered(p, ring, tiles, queue, shared);
        } else if (threadIdx.x < kWarpSize) {
            Grad::load(p, ring, tiles, queue, shared);
        }
    } else if (!kCombines || threadIdx.x < kThreads) {
        ptx::setmaxnreg_increase<kBudget.consumer>();
        Grad::multiply(p, ring, queue, shared);
    } else if constexpr (kCombines) {
        ptx::setmaxnreg_decrease<kBudget.helper>();
        if (p.operands_are_old) end_beside();
        combine_tokens<Element>(p.beside);
    }
    leave_block<kTile>();
    if (p.operands_are_old) end_beside();
}

}  // namespace scattermoe::kernels::sm90
