#pragma once

// The tiles there are on Hopper and what they need of an SM. No CUDA header: the choice between them is tested on the
// host.

#include <cstdint>

#include "../types.h"

namespace scattermoe::kernels::sm90 {

// A block computes output tiles of m x n, one after the other, with one warpgroup that loads and two that multiply.
// Cooperative: the two share a tile, half its rows each. Ping-pong: each has a tile of its own, and one's epilogue runs
// while the other keeps the tensor cores busy. Paired: cooperative, and two blocks of a cluster compute neighbouring
// tiles that have the wide operand in common, of which each fetches half for both: a third less comes from L2.
enum class Tile : int {
    kPingPong128x192,
    kPingPong128x128,
    kCooperative128x256,
    kCooperative256x128,
    kPaired128x256,
    kPaired256x128,
};

inline constexpr int kConsumers = 2;
inline constexpr int kPair = 2;  // blocks of a cluster
inline constexpr uint16_t kPairMask = (1 << kPair) - 1;
inline constexpr int kStageK = 64;  // of the contraction in one stage: 128 bytes, the width of the swizzle

struct TileShape {
    int m;
    int n;
    bool ping_pong;
    int staging_buffers;  // 2 KB each, for every consumer warp: what the stages leave room for
    bool paired = false;  // m and n are one block's

    SCATTERMOE_HD constexpr int a_bytes() const { return m * kStageK * 2; }
    SCATTERMOE_HD constexpr int b_bytes() const { return n * kStageK * 2; }
    SCATTERMOE_HD constexpr int stage_bytes() const { return a_bytes() + b_bytes(); }
    // Blocks of 64 rows that a consumer warpgroup multiplies.
    SCATTERMOE_HD constexpr int consumer_blocks() const { return ping_pong ? m / 64 : m / 128; }
    SCATTERMOE_HD constexpr int accumulators() const { return consumer_blocks() * n / 2; }
    // How many tiles side by side are a pair's, along m and along n: the wide operand is what they have in common.
    SCATTERMOE_HD constexpr int pair_m() const { return paired && m < n ? kPair : 1; }
    SCATTERMOE_HD constexpr int pair_n() const { return paired && m > n ? kPair : 1; }
};

SCATTERMOE_HD constexpr TileShape tile_shape(Tile tile) {
    switch (tile) {
        case Tile::kPingPong128x192:
            return {128, 192, true, 1};
        case Tile::kPingPong128x128:
            return {128, 128, true, 2};
        case Tile::kCooperative128x256:
            return {128, 256, false, 2};
        case Tile::kCooperative256x128:
            return {256, 128, false, 2};
        case Tile::kPaired128x256:
            return {128, 256, false, 2, true};
        case Tile::kPaired256x128:
            return {256, 128, false, 2, true};
    }
    return {};
}

// ---- Shared memory ----

inline constexpr int kSharedBytes = 227 * 1024;  // all that one block can have
inline constexpr int kMaxStages = 7;
inline constexpr int kQueueEntries = 16, kQueueBytes = kQueueEntries * (8 + 32);  // tile_queue.h
inline constexpr int kBarrierBytes = 128 + kQueueBytes;
inline constexpr int kStagingBufferBytes = 2048;  // 16 rows of 64 columns
inline constexpr int kConsumerWarps = kConsumers * 4;

SCATTERMOE_HD constexpr int staging_bytes(Tile tile) {
    return kConsumerWarps * tile_shape(tile).staging_buffers * kStagingBufferBytes;
}

// As many stages as fit: 5 and 6 for ping-pong tiles, else 4. Ping-pong tiles want five or six, and gathered rows
// some 3000 cycles of products in flight.
SCATTERMOE_HD constexpr int stage_count(Tile tile) {
    return (kSharedBytes - kBarrierBytes - staging_bytes(tile)) / tile_shape(tile).stage_bytes();
}

SCATTERMOE_HD constexpr int shared_bytes(Tile tile) {
    return stage_count(tile) * tile_shape(tile).stage_bytes() + staging_bytes(tile) + kBarrierBytes;
}

// Two barriers for each stage and two that order the consumers, eight bytes each.
static_assert((2 * kMaxStages + 2) * 8 + kQueueBytes <= kBarrierBytes);
static_assert(stage_count(Tile::kPingPong128x192) == 5 && stage_count(Tile::kPingPong128x128) == 6 &&
              stage_count(Tile::kCooperative128x256) == 4 && stage_count(Tile::kCooperative256x128) == 4);

// A weight gradient's kernel keeps the order of up to so many experts.
inline constexpr int kMaxOrderedExperts = 1024;
SCATTERMOE_HD constexpr int weight_grad_shared_bytes(Tile tile) {
    return shared_bytes(tile) + kMaxOrderedExperts * 2;
}
static_assert(weight_grad_shared_bytes(Tile::kPingPong128x192) <= kSharedBytes &&
              weight_grad_shared_bytes(Tile::kCooperative128x256) <= kSharedBytes &&
              weight_grad_shared_bytes(Tile::kCooperative256x128) <= kSharedBytes);

// Columns that a warp stages at a time. A tile of gates and ups has half as many columns of either.
inline constexpr int kStoreColumns = 64;
SCATTERMOE_HD constexpr int glu_store_columns(Tile tile) {
    return tile_shape(tile).n / 2 % 64 == 0 ? 64 : 32;
}

// ---- Registers ----

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
// With a helper, the last warpgroup: it does something else beside the products.
inline constexpr int kThreadsWithHelper = (2 + kConsumers) * kWarpgroupThreads;
SCATTERMOE_HD constexpr int block_threads(bool has_helper) {
    return has_helper ? kThreadsWithHelper : kThreads;
}

// What a block has for each thread when it starts, and what setmaxnreg makes of it: the producer's warpgroup hands
// registers to the others. One that starts bulk copies needs almost none; one that gathers needs an address for each
// copy, or every copy waits for the one before to have read its own. With 192 accumulators the consumers are at the
// edge of spilling.
inline constexpr int kLaunchRegisters = 64 * 1024 / kThreads / 8 * 8;

struct RegisterBudget {
    int producer;
    int consumer;
};

// crowded: 192 accumulators and an epilogue with more to do than store them. The producer's copies then wait for each
// other, which 192 columns leave time for.
SCATTERMOE_HD constexpr RegisterBudget register_budget(bool gathers, bool crowded) {
    return gathers && !crowded ? RegisterBudget{56, 224} : RegisterBudget{40, 232};
}

constexpr bool fits_registers(RegisterBudget budget) {
    return budget.producer + kConsumers * budget.consumer <= (1 + kConsumers) * kLaunchRegisters;
}
static_assert(fits_registers(register_budget(true, false)) && fits_registers(register_budget(false, false)));

// 128: ptxas then takes no wgmma of 256 columns, whose 128 accumulators are of one instruction, but two of 128.
inline constexpr int kLaunchRegistersWithHelper = 64 * 1024 / kThreadsWithHelper / 8 * 8;

struct HelperRegisterBudget {
    int producer;
    int consumer;
    int helper;
};

// The gathering of a weight gradient has more to hold than that of a product. The consumers have 128 accumulators and
// nothing to do but store them; the helper sums rows, eight in flight.
inline constexpr HelperRegisterBudget kCombiningWeightGradBudget{64, 168, 112};

// Without a helper.
inline constexpr RegisterBudget kGatheringWeightGradBudget{64, 216};
static_assert(fits_registers(kGatheringWeightGradBudget));

constexpr bool fits_registers(HelperRegisterBudget budget) {
    return budget.producer + kConsumers * budget.consumer + budget.helper <=
           (2 + kConsumers) * kLaunchRegistersWithHelper;
}
static_assert(fits_registers(kCombiningWeightGradBudget));

// Whether the gated epilogue has registers left for a bias and for interleaved columns.
SCATTERMOE_HD constexpr bool has_room_for_glu(Tile tile) {
    return tile_shape(tile).accumulators() <= 128;
}

}  // namespace scattermoe::kernels::sm90
