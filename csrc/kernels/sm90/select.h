#pragma once

// Which tile a product takes on Hopper, as pure functions of its shape. What they say of speed was measured on an H200:
// docs/kernels.md has the table.

#include "../types.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

struct TileChoice {
    Tile tile;
    const char* why;
};

// Whether tiles of so many columns compute more than one in `part` of an output's n for nothing, beyond what tiles of
// `other` columns do. The wider tile reads less for each product; that is worth a little.
constexpr bool wastes_more(int64_t n, int tile, int other, int part) {
    return round_up(n, tile) > round_up(n, other) + round_up(n, other) / part;
}

// Longer ones read so much for a tile that nobody finds in L2 what was read for the tile before.
inline constexpr int64_t kLongContraction = 8192;

// From how many rows of an expert on, in the mean, pairs of 128 of them are worth it where the contraction is short.
inline constexpr int64_t kManyRows = 1024;

// out = in W^T, k: the contraction, rows: an expert's, in the mean. Where tiles of 256 columns fit, it is pairs that
// are held, and stored between the next tile's products; but for contractions so short that there is little in between.
constexpr TileChoice select_store_tile(int64_t n, int64_t k, int64_t rows, bool gathered, bool weight_k_contiguous) {
    if (gathered) {
        if (weight_k_contiguous && wastes_more(n, 256, 192, 64)) {
            return {Tile::kPingPong128x192, "ping-pong 128x192: fewer columns for nothing than 128x256"};
        }
        return {Tile::kPaired128x256, "paired 128x256: the least traffic for each product"};
    }
    if (!wastes_more(n, 256, 192, 20) && !wastes_more(n, 256, 128, 20)) {
        if (k > kLongContraction) return {Tile::kCooperative128x256, "cooperative 128x256: memory is read the least"};
        if (k > 512 || (k == 512 && rows >= kManyRows))
            return {Tile::kPaired128x256, "paired 128x256: the least traffic for each product"};
        if (k <= 256) return {Tile::kCooperative128x256, "cooperative 128x256: few stages a tile"};
    }
    if (!wastes_more(n, 192, 128, 24)) {
        return {Tile::kPingPong128x192, "ping-pong 128x192 (registers: 192 accumulators)"};
    }
    return {Tile::kPingPong128x128, "ping-pong 128x128: fewer columns for nothing than 128x192"};
}

// hidden = act(in W^T), with as many columns of either half of a tile. The narrow tile hides the activation behind the
// other consumer's products, but asks more of L2, which is what these products wait for.
constexpr TileChoice select_glu_tile(int64_t width, bool needs_room) {
    constexpr Tile kNarrow = Tile::kPingPong128x192;
    static_assert(!has_room_for_glu(kNarrow) && has_room_for_glu(Tile::kPaired128x256));
    if (!needs_room && wastes_more(width, 128, tile_shape(kNarrow).n / 2, 20)) {
        return {kNarrow, "ping-pong 128x192: fewer columns for nothing than 128x256"};
    }
    return {Tile::kPaired128x256, needs_room ? "paired 128x256: registers for a bias or interleaved columns"
                                             : "paired 128x256: the least traffic for each product"};
}

// The product with W_down that goes on through the activation's backward. A tile with half its columns past the
// matrix's last computes only the other half.
constexpr TileChoice select_glu_backward_tile() {
    return {Tile::kPaired128x256, "paired 128x256: the least traffic for each product"};
}

// In how many parts it leaves <dA, act(z)>: one for each tile of columns.
constexpr int gate_parts(int64_t n) {
    return static_cast<int>(ceil_div(n, tile_shape(select_glu_backward_tile().tile).n));
}

// Whether tiles are dealt out as blocks ask for them, or beforehand. With a short contraction, asking costs more than
// blocks that drift apart; with a long one it gains nothing.
constexpr bool deals_tiles(int64_t k) {
    return k > 512 && k <= kLongContraction;
}

// out[e] = left^T right, left and right of m and n columns.
enum class GatheredSide : int { kNeither, kLeft, kRight };

// A weight gradient's kernel can have a helper that sums rows over the slots of tokens meanwhile; or write the
// transposed gradient, so that what is gathered on the right may be taken as the left.
enum class GradVariant : int { kPlain, kBesideSum, kTransposed };

// Whether there is a kernel with a helper: where an MLP's backward wants one.
constexpr bool combines_beside(GatheredSide gathered) {
    return gathered != GatheredSide::kNeither;
}

// sums: something is summed beside. One instruction multiplies all columns of a 128x256 tile, if the kernel has no
// helper; that is why a gradient with the right side gathered is better computed transposed.
constexpr TileChoice select_weight_grad_tile(int64_t m, int64_t n, GatheredSide gathered, bool sums) {
    switch (gathered) {
        case GatheredSide::kLeft:
            if (!wastes_more(m, 256, 128, 8))
                return {Tile::kPaired128x256, "paired 128x256: the gathered side is the short one"};
            return {Tile::kCooperative128x256, "cooperative 128x256: the gathered side is the short one"};
        case GatheredSide::kRight:
            if (!sums && !wastes_more(n, 256, 128, 8) && !wastes_more(m, 256, 128, 20))
                return {Tile::kPaired128x256, "paired 128x256, transposed: the gathered side is the short one"};
            if (!wastes_more(n, 256, 128, 8))
                return {Tile::kPaired256x128, "paired 256x128: the gathered side is the short one"};
            return {Tile::kCooperative256x128, "cooperative 256x128: the gathered side is the short one"};
        case GatheredSide::kNeither:
            break;
    }
    if (!wastes_more(n, 192, 256, 20))
        return {Tile::kPingPong128x192, "ping-pong 128x192 (registers: 192 accumulators)"};
    return {Tile::kCooperative128x256, "cooperative 128x256: fewer columns for nothing than 128x192"};
}

}  // namespace scattermoe::kernels::sm90
