#pragma once

// Which kernel and tile a product takes: pure functions of dtype, shape, alignment and architecture, so that they can
// be tested and shown without a GPU. The same shape always takes the same kernel; nothing is tuned at run time.

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace scattermoe::kernels {

enum class GemmEngine : int {
    kSimt,        // fused multiply-add, IEEE float32 or float64
    kTensorCore,  // mma.sync: bfloat16, float16, TF32
    kHopper,      // wgmma and TMA: bfloat16, float16 on 9.0; its tiles are in sm90/select.h
};

// Which dimension of an operand is contiguous in memory: the contraction, or the other one (m of A, n of B).
enum class Major : int { kK, kMn };

// What one thread block computes: an m x n tile of the output, with `stages` blocks of the contraction, each k_bytes
// deep, on their way from memory.
struct GemmTile {
    int m;
    int n;
    int k_bytes;
    int warps_m;
    int warps_n;
    int stages;
    int blocks_per_sm;  // what registers and shared memory leave room for on the chips the tile is meant for

    SCATTERMOE_HD constexpr int threads() const { return warps_m * warps_n * 32; }
    SCATTERMOE_HD constexpr int stage_bytes() const { return (m + n) * k_bytes; }
    SCATTERMOE_HD constexpr int shared_bytes() const { return stages * stage_bytes(); }
    SCATTERMOE_HD constexpr int k_elements(int element_bytes) const { return k_bytes / element_bytes; }
};

// The tiles there are. Tensor-core tiles are four warps of 64 x 64 each: 128 accumulators a thread, which with
// double-buffered fragments is what 255 registers hold, and as many products for each ldmatrix as registers allow. Two
// blocks share an SM, so that one's epilogue and first loads hide behind the other's products.
enum class TileId : int {
    // 3 stages of 128 bytes, 96 KB: two blocks need an SM of 228 KB (9.x, 10.x).
    kDeep,
    // Eight such warps in one block, 4 stages of 128 bytes, 192 KB: a quarter less traffic for the same products than
    // two
    // blocks side by side, for outputs that fill it.
    kWide,
    // 3 stages of 64 bytes, 48 KB: two blocks fit an SM of 100 KB (8.6, 8.9, 12.x), and 8.0 with room to spare.
    kFlat,
    // Few rows for each expert (decoding): the product reads every weight for a handful of rows and is bound by memory,
    // so
    // rows are not padded beyond 32 and more stages are in flight.
    kDeepSlim,
    kFlatSlim,
    // Fused multiply-add: 256 threads, 8 x 8 (float32) or 4 x 4 (float64) outputs each.
    kSimt32,
    kSimt64,
};

SCATTERMOE_HD constexpr GemmTile tile_shape(TileId tile) {
    switch (tile) {
        case TileId::kDeep:
            return {128, 128, 128, 2, 2, 3, 2};
        case TileId::kWide:
            return {128, 256, 128, 2, 4, 4, 1};
        case TileId::kFlat:
            return {128, 128, 64, 2, 2, 3, 2};
        case TileId::kDeepSlim:
            return {32, 128, 128, 1, 4, 4, 2};
        case TileId::kFlatSlim:
            return {32, 128, 64, 1, 4, 4, 2};
        case TileId::kSimt32:
            return {128, 128, 32, 8, 1, 2, 2};
        case TileId::kSimt64:
            return {64, 64, 64, 8, 1, 2, 2};
    }
    return {};
}

// Shared memory of an SM, and what each block takes besides its tile.
inline constexpr int kLargeSharedMemory = 227 * 1024, kSmallSharedMemory = 99 * 1024, kBlockOverhead = 1024;

constexpr bool fits_shared_memory(TileId tile, int bytes) {
    const GemmTile shape = tile_shape(tile);
    return shape.blocks_per_sm * (shape.shared_bytes() + kBlockOverhead) <= bytes;
}
static_assert(fits_shared_memory(TileId::kDeep, kLargeSharedMemory));
static_assert(fits_shared_memory(TileId::kWide, kLargeSharedMemory));
static_assert(fits_shared_memory(TileId::kDeepSlim, kLargeSharedMemory));
static_assert(fits_shared_memory(TileId::kFlat, kSmallSharedMemory));
static_assert(fits_shared_memory(TileId::kFlatSlim, kSmallSharedMemory));

// True for the architectures (of the compiled code, 90 for 9.0) whose SMs have 228 KB of shared memory. Device code is
// compiled for one of the two families alone, by the architecture it is compiled for.
SCATTERMOE_HD constexpr bool has_large_shared_memory(int code_arch) {
    return code_arch >= 90 && code_arch < 120;
}

// Mean rows for each expert up to which the slim tile is taken: the 128-row tile would be more than half padding.
inline constexpr int64_t kSlimRows = 48;

struct GemmQuery {
    DType dtype;
    bool allow_tf32;  // float32 alone: whether products may round their operands to TF32
    int code_arch;    // architecture that the loaded code was compiled for: 80, 86, 89, 90, 100, 120
    bool aligned;     // every row of both operands starts at a multiple of 16 bytes
    int64_t rows;     // grouped rows in all
    int64_t num_experts;
    bool weight_gradient;    // the contraction runs over the rows
    int64_t columns = 4096;  // of the output (of one expert's, for a weight gradient)
    bool hopper = false;     // the kernels of sm90/ are there and take the operands
};

// Whether tiles of 256 columns compute hardly more padding than tiles of 128.
constexpr bool fills_wide_tiles(int64_t columns) {
    const int64_t half_tiles = ceil_div(columns, tile_shape(TileId::kWide).n / 2);
    return half_tiles % 2 == 0 || half_tiles >= 16;
}

struct GemmChoice {
    GemmEngine engine;
    TileId tile;
    bool vector_copies;  // 16-byte cp.async; else one element at a time through registers
    const char* why;
};

constexpr GemmChoice select_gemm(const GemmQuery& query) {
    if (query.dtype == DType::kFloat64) {
        return {GemmEngine::kSimt, TileId::kSimt64, false, "float64: fused multiply-add, 64x64 tile (registers)"};
    }
    if (query.dtype == DType::kFloat32 && !query.allow_tf32) {
        return {GemmEngine::kSimt, TileId::kSimt32, false,
                "IEEE float32: fused multiply-add, 128x128 tile (registers)"};
    }
    const bool large = has_large_shared_memory(query.code_arch);
    if (!query.aligned) {
        return {GemmEngine::kTensorCore, large ? TileId::kDeep : TileId::kFlat, false,
                "mma.sync, element-wise copies: rows do not start at multiples of 16 bytes"};
    }
    if (!query.weight_gradient && query.rows <= kSlimRows * query.num_experts) {
        return {GemmEngine::kTensorCore, large ? TileId::kDeepSlim : TileId::kFlatSlim, true,
                "mma.sync, 32-row tile: few rows for each expert, bound by the weights' memory traffic"};
    }
    if (query.hopper) {
        return {GemmEngine::kHopper, TileId::kWide, true, "wgmma, rows and weights by TMA, gathered rows by cp.async"};
    }
    if (!large) {
        return {GemmEngine::kTensorCore, TileId::kFlat, true,
                "mma.sync, 128x128 tile, 64-byte stages (registers; two blocks in 100 KB of shared memory)"};
    }
    if (!fills_wide_tiles(query.columns)) {
        return {GemmEngine::kTensorCore, TileId::kDeep, true,
                "mma.sync, 128x128 tile, 128-byte stages (registers; too few columns for 256 at a time)"};
    }
    return {GemmEngine::kTensorCore, TileId::kWide, true,
            "mma.sync, 128x256 tile, 128-byte stages (registers; 228 KB of shared memory)"};
}

// ---- Other kernels ----

// An MLP's backward: where the sum over slots of the rows dz W_up, that is dL/dx, has its place: right behind those
// rows, or beside a gradient of weights that comes right behind them, or behind dL/dW_down that does.
enum class SumPlace : int { kAlone, kBesideDownGradient, kBesideUpGradient, kBehindDownGradient };

// Sizes of the MLP: up_rows are the rows of w_up, 2 width where the activation is gated. A sum that waits for a
// gradient of weights keeps its rows in memory beside it. With dL/dW_down, computed after dz W_up then and not before,
// the peak grows by no more than the S width elements that dL/dW_down is computed from; with dL/dW_up by that gradient
// or by the rows, the smaller of the two. So dL/dW_down it is where it takes less, and where it takes long enough to
// hide the sum: the time of either is proportional to S H, and the quotient is the width.
//
// A gradient right behind a product begins on SMs that the last tiles of that leave idle, which is worth most where
// tiles take long. So it comes there also without a sum beside it, where the rows find room in what dL/dW_up takes
// later.
constexpr SumPlace place_of_sum(int64_t num_slots, int64_t num_experts, int64_t hidden, int64_t width,
                                int64_t up_rows) {
    constexpr int64_t kLongWidth = 512, kTooLongWidth = 4096;
    const int64_t gated_hidden = num_slots * width, up_gradient = num_experts * up_rows * hidden;
    const bool rows_are_larger = num_slots >= num_experts * up_rows;  // than dL/dW_up
    if (width > kTooLongWidth) {  // a helper costs the gradient more than the sum takes
        return gated_hidden + num_slots * hidden <= up_gradient ? SumPlace::kBehindDownGradient : SumPlace::kAlone;
    }
    if (rows_are_larger && (width < kLongWidth || up_gradient < gated_hidden)) return SumPlace::kBesideUpGradient;
    return gated_hidden <= up_gradient ? SumPlace::kBesideDownGradient : SumPlace::kAlone;
}

// Slots up to which one block sorts all of them: counting in several would take three kernels.
inline constexpr int64_t kSingleBlockSlots = 4096;

// In how many parts the rows of an expert are summed for a gradient of biases: enough blocks to fill a large GPU, few
// enough parts that adding them up in a second kernel costs little.
constexpr int64_t bias_grad_parts(int64_t num_experts, int64_t num_slots, int64_t n) {
    constexpr int64_t kWantedBlocks = 1024, kMaxParts = 64, kColumnsPerBlock = 256;
    constexpr int64_t kMinRows = 128;  // mean rows of a part
    const int64_t blocks = std::max<int64_t>(1, num_experts * ceil_div(n, kColumnsPerBlock));
    return std::max<int64_t>(1, std::min({kMaxParts, ceil_div(kWantedBlocks, blocks), ceil_div(num_slots, kMinRows)}));
}

}  // namespace scattermoe::kernels
