#pragma once

// What epilogues have in common, and those that write a tile as it is, with a bias, or the activation of it too. Those
// of paired tiles hold what they can, and store it between the next tile's products (held_sums.h).

#include <cuda_runtime.h>

#include <cstdint>

#include "../activation.h"
#include "../grouped_gemm.h"
#include "held_sums.h"
#include "staged_store.h"
#include "tile_walker.h"

namespace scattermoe::kernels::sm90 {

// An epilogue for which nothing comes by way of the ring.
struct NoInput {
    static constexpr bool kHasInput = false;

    __device__ __forceinline__ void look_ahead(const OutputTile&) {}
    __device__ __forceinline__ void begin() {}
};

// What every epilogue of a grouped product has: where its warp stands in a tile, and its part of the staging buffers.
template <Tile kTile>
struct ConsumerWarp {
    static constexpr TileShape kShape = tile_shape(kTile);

    int consumer;
    int warp;  // of the warpgroup
    int lane;

    __device__ __forceinline__ ConsumerWarp()
        : consumer(threadIdx.x / kWarpgroupThreads - 1),
          warp(threadIdx.x % kWarpgroupThreads / kWarpSize),
          lane(threadIdx.x % kWarpSize) {}

    __device__ __forceinline__ uint32_t staging(uint32_t all) const {
        return all + (consumer * 4 + warp) * kShape.staging_buffers * kStagingBufferBytes;
    }
    // The first of the warp's rows in block `block` of the warpgroup.
    __device__ __forceinline__ int row(int block) const {
        const int first_block = kShape.ping_pong ? 0 : consumer * kShape.consumer_blocks();
        return (first_block + block) * 64 + warp * 16;
    }
    __device__ __forceinline__ int index_in_grid() const {
        return static_cast<int>(blockIdx.x) * kConsumerWarps + consumer * 4 + warp;
    }
    __device__ __forceinline__ static int warps_in_grid() { return static_cast<int>(gridDim.x) * kConsumerWarps; }
};

// Elements column and column + 1 of a row as floats, or its last two, where they are past its end and what they are
// added to is not stored. Address and all in one volatile piece: the compiler would else compute a tile's addresses, or
// issue its loads, ahead of their use, and spill them.
template <typename Element>
__device__ __forceinline__ float2 load_pair(const Element* row, int column, int columns) {
    uint32_t pair;
    asm volatile(
        "{\n"
        ".reg .s32 column;\n"
        ".reg .s64 address;\n"
        "min.s32 column, %2, %3;\n"
        "mad.wide.s32 address, column, 2, %1;\n"
        "ld.global.nc.b32 %0, [address];\n"
        "}"
        : "=r"(pair)
        : "l"(row), "r"(column), "r"(columns - 2));
    return unpack<Element>(pair);
}

// Adds to both rows of each block of eight columns: bias(j) -> float2 for columns 8 j + 2 (lane % 4) and the next.
template <int kBlocks, int kSums, typename Bias>
__device__ __forceinline__ void add_bias(float (&sums)[kBlocks][kSums], Bias&& bias) {
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
        const float2 pair = bias(j);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            sums[block][4 * j] += pair.x;
            sums[block][4 * j + 1] += pair.y;
            sums[block][4 * j + 2] += pair.x;
            sums[block][4 * j + 3] += pair.y;
        }
    }
}

template <typename Element, Tile kTile>
class StoreEpilogue : public NoInput {
    static constexpr TileShape kShape = tile_shape(kTile);
    using Store = StagedStore<Element, kStoreColumns, kShape.staging_buffers>;

  public:
    using Arguments = StoreArguments;
    static constexpr bool kHolds = kShape.paired;
    static constexpr int kHalves = 1;
    static constexpr bool kCrowded = false;

    __device__ __forceinline__ StoreEpilogue(const Arguments& arguments, uint32_t staging)
        : arguments_(arguments), store_(warp_.staging(staging)) {}

    // Holds a finished tile for store_next(), if that is done with what it held before; false if it must be stored at
    // once: where the copy engine cannot, because rows are not all the expert's, or scattered.
    template <typename Sums>
    __device__ __forceinline__ bool hold(Sums& sums, const OutputTile& tile) {
        static_assert(kShape.consumer_blocks() == 1);
        const int row = warp_.row(0);
        if (tile.rows - row < 16 || arguments_.rows.slot_order != nullptr) return false;
        add_biases(sums, tile);
        held_.hold(sums[0]);
        row_ = tile.row + row;
        column_ = tile.column * kShape.n;
        steps_.begin(min(kParts, (arguments_.columns - column_ + 63) / 64));
        return true;
    }

    // A step of what is held; false where nothing is left.
    __device__ __forceinline__ bool store_next() {
        return steps_.next([&](int part) { store_.send(arguments_.out_map, column_ + part * 64, 0, row_); },
                           [&](int part) {
                               with_constant<kParts>(part, [&]<int kPart>() {
                                   store_.stage([&](int j) { return held_.block(kPart * 8 + j); });
                               });
                           });
    }

    // Stores a finished tile.
    template <typename Sums>
    __device__ __forceinline__ void store(Sums& sums, const OutputTile& tile) {
        const int first_column = tile.column * kShape.n;
        add_biases(sums, tile);
        const StoreTarget target{&arguments_.out_map, arguments_.out, arguments_.stride, 0, arguments_.columns};
#pragma unroll
        for (int block = 0; block < kShape.consumer_blocks(); ++block) {
            const int row = warp_.row(block);
            if (row >= tile.rows) continue;
            const WarpRows rows(arguments_.rows, tile.row + row, tile.rows - row);
            const float (&s)[kShape.n / 2] = sums[block];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int column = first_column + part * 64;
                if (column >= arguments_.columns) break;
                store_.stage([&](int j) {
                    const int i = (part * 8 + j) * 4;
                    return make_uint2(pack<Element>(s[i], s[i + 1]), pack<Element>(s[i + 2], s[i + 3]));
                });
                store_.send(target, rows, 0, column);
            }
        }
    }

    __device__ __forceinline__ void finish(int32_t first_sentinel, int32_t num_slots) {
        zero_sentinel_rows(static_cast<Element*>(arguments_.out), arguments_.stride, arguments_.columns,
                           arguments_.rows, first_sentinel, num_slots, warp_.index_in_grid(), warp_.warps_in_grid());
        Store::drain();
    }

  private:
    static constexpr int kParts = kShape.n / 64;

    template <typename Sums>
    __device__ __forceinline__ void add_biases(Sums& sums, const OutputTile& tile) const {
        if (arguments_.bias == nullptr) return;
        const Element* const bias =
            static_cast<const Element*>(arguments_.bias) + int64_t{tile.expert} * arguments_.columns;
        const int column = tile.column * kShape.n + warp_.lane % 4 * 2;
        add_bias(sums, [&](int j) { return load_pair(bias, column + 8 * j, arguments_.columns); });
    }

    const Arguments& arguments_;
    ConsumerWarp<kTile> warp_;
    Store store_;
    HeldSums<Element, kShape.n / 2> held_;
    HeldSteps steps_;
    int row_, column_;  // of what is held
};

template <typename Element, Tile kTile, Activation kActivation>
class GluEpilogue : public NoInput {
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr int kHalf = kShape.n / 2;  // columns
    static constexpr int kPart = glu_store_columns(kTile);
    static constexpr int kUp = kHalf / 2;  // where the ups begin among a row's sums
    static_assert(kHalf % kPart == 0 && is_gated(kActivation));
    using Store = StagedStore<Element, kPart, kShape.staging_buffers * (64 / kPart)>;

  public:
    using Arguments = GluArguments;
    static constexpr bool kHolds = kShape.paired;
    static constexpr int kHalves = 2;
    static constexpr bool kCrowded = !has_room_for_glu(kTile);

    __device__ __forceinline__ GluEpilogue(const Arguments& arguments, uint32_t staging)
        : arguments_(arguments), store_(warp_.staging(staging)) {}

    // As above. The activation is computed and stored at once, z is held.
    template <typename Sums>
    __device__ __forceinline__ bool hold(Sums& sums, const OutputTile& tile) {
        static_assert(kShape.consumer_blocks() == 1);
        const int row = warp_.row(0), first_column = tile.column * kHalf, width = arguments_.width;
        if (tile.rows - row < 16 || arguments_.z.pointer == nullptr || arguments_.layout == GluLayout::kInterleaved)
            return false;
        add_glu_bias(sums, tile, first_column);
        row_ = tile.row + row;
        column_ = first_column;
        const int parts = min(kParts, (width - column_ + kPart - 1) / kPart);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            if (part >= parts) break;
            stage_hidden(sums[0], part);
            store_.send(arguments_.hidden_map, column_ + part * kPart, 0, row_);
        }
        held_.hold(sums[0]);
        steps_.begin(2 * parts);
        return true;
    }

    __device__ __forceinline__ bool store_next() {
        const int gate_half = arguments_.layout == GluLayout::kUpGate ? 1 : 0;
        return steps_.next(
            [&](int step) { store_.send(arguments_.z.map, column_ + step / 2 * kPart, gate_half ^ step % 2, row_); },
            [&](int step) {
                with_constant<2 * kParts>(step, [&]<int kStep>() {
                    constexpr int kFirst = kStep % 2 * (kHalf / 8) + kStep / 2 * (kPart / 8);
                    store_.stage([&](int j) { return held_.block(kFirst + j); });
                });
            });
    }

    template <typename Sums>
    __device__ __forceinline__ void store(Sums& sums, const OutputTile& tile) {
        const int first_column = tile.column * kHalf, width = arguments_.width;
        add_glu_bias(sums, tile, first_column);
        const StoreTarget z = arguments_.z.target(arguments_.layout, width);
        const StoreTarget hidden{&arguments_.hidden_map, arguments_.hidden, width, 0, width};
        const bool wants_z = arguments_.z.pointer != nullptr;
        const bool interleaved = !kCrowded && arguments_.layout == GluLayout::kInterleaved;
        const int gate_half = arguments_.layout == GluLayout::kUpGate ? 1 : 0;
#pragma unroll
        for (int block = 0; block < kShape.consumer_blocks(); ++block) {
            const int row = warp_.row(block);
            if (row >= tile.rows) continue;
            const WarpRows rows(RowMap{}, tile.row + row, tile.rows - row);
            const float (&s)[kShape.n / 2] = sums[block];
            const auto packed = [&](int i) {
                return make_uint2(pack<Element>(s[i], s[i + 1]), pack<Element>(s[i + 2], s[i + 3]));
            };
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int column = first_column + part * kPart;
                if (column >= width) break;
                const auto gate = [&](int j) { return packed((part * kPart / 8 + j) * 4); };
                const auto up = [&](int j) { return packed(kUp + (part * kPart / 8 + j) * 4); };
                if (wants_z && !interleaved) {
                    store_.stage(gate);
                    store_.send(z, rows, gate_half, column);
                    store_.stage(up);
                    store_.send(z, rows, gate_half ^ 1, column);
                } else if (wants_z) {
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        store_.stage_interleaved([&](int j) { return gate(side * Store::kBlocks / 2 + j); },
                                                 [&](int j) { return up(side * Store::kBlocks / 2 + j); });
                        store_.send(z, rows, 0, 2 * column + side * kPart);
                    }
                }
                stage_hidden(s, part);
                store_.send(hidden, rows, 0, column);
            }
        }
    }

    __device__ __forceinline__ void finish(int32_t first_sentinel, int32_t num_slots) {
        const int warp = warp_.index_in_grid(), warps = warp_.warps_in_grid(), width = arguments_.width;
        zero_sentinel_rows(static_cast<Element*>(arguments_.hidden), width, width, RowMap{}, first_sentinel, num_slots,
                           warp, warps);
        if (arguments_.z.pointer != nullptr) {
            zero_sentinel_rows(static_cast<Element*>(arguments_.z.pointer), 2 * int64_t{width}, 2 * width, RowMap{},
                               first_sentinel, num_slots, warp, warps);
        }
        Store::drain();
    }

  private:
    static constexpr int kParts = kHalf / kPart;

    __device__ __forceinline__ void stage_hidden(const float (&s)[kShape.n / 2], int part) {
        store_.stage([&](int j) {
            const int i = (part * kPart / 8 + j) * 4;
            return make_uint2(pack<Element>(activate(s[i], s[kUp + i]), activate(s[i + 1], s[kUp + i + 1])),
                              pack<Element>(activate(s[i + 2], s[kUp + i + 2]), activate(s[i + 3], s[kUp + i + 3])));
        });
    }

    __device__ __forceinline__ float activate(float gate, float up) const {
        return gated_activation<kActivation, float>(gate, up, arguments_.alpha, arguments_.limit).h;
    }

    template <typename Sums>
    __device__ __forceinline__ void add_glu_bias(Sums& sums, const OutputTile& tile, int first_column) const {
        if (kCrowded || arguments_.bias == nullptr) return;
        const int width = arguments_.width;
        const Element* const bias = static_cast<const Element*>(arguments_.bias) + int64_t{tile.expert} * 2 * width;
        const int column = first_column + warp_.lane % 4 * 2;
        if (arguments_.layout == GluLayout::kInterleaved) {
            add_bias(sums, [&](int j) {
                const int first = 2 * (column + 8 * j % kHalf);
                const float2 pair = load_pair(bias, first, 2 * width), next = load_pair(bias, first + 2, 2 * width);
                return 8 * j < kHalf ? float2{pair.x, next.x} : float2{pair.y, next.y};
            });
        } else {
            const bool gate_first = arguments_.layout == GluLayout::kGateUp;
            const Element *const gate = bias + (gate_first ? 0 : width), *const up = bias + (gate_first ? width : 0);
            add_bias(sums, [&](int j) { return load_pair(8 * j < kHalf ? gate : up, column + 8 * j % kHalf, width); });
        }
    }

    const Arguments& arguments_;
    ConsumerWarp<kTile> warp_;
    Store store_;
    HeldSums<Element, kShape.n / 2> held_;
    HeldSteps steps_;
    int row_, column_;  // of what is held
};

}  // namespace scattermoe::kernels::sm90
