#pragma once

// The epilogue of dA' = dO W_down that goes on through a gated activation.

#include <cuda_runtime.h>

#include <cstdint>

#include "../activation.h"
#include "../ptx/global_memory.h"
#include "../ptx/stmatrix.h"
#include "epilogue.h"

namespace scattermoe::kernels::sm90 {

// Accumulators are spread over the lanes in pairs of columns, while z and what is written want 16 bytes of a row for
// each lane. So a unit of a warp's work, sixteen rows of 64 columns, goes through one of its two staging buffers,
// rounded: a lane then has, in each of four passes, eight columns of a row, eight lanes a row. What it needs of z it
// loads a unit ahead, the first unit's while the last products run; lines of z come to L2 while the products begin.
template <typename Element, Tile kTile, Activation kActivation>
class GluBackwardEpilogue {
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr int kBlocks = kShape.consumer_blocks();
    static constexpr int kUnitColumns = 64;
    static constexpr int kParts = kShape.n / kUnitColumns;
    static constexpr int kUnits = kBlocks * kParts;
    static constexpr int kVector = kVectorBytes / sizeof(Element);
    static constexpr int kRowLanes = kUnitColumns / kVector;
    static constexpr int kPassRows = kWarpSize / kRowLanes;
    static constexpr int kPasses = 16 / kPassRows;
    using Store = StagedStore<Element, kUnitColumns, kShape.staging_buffers>;
    static_assert(sizeof(Element) == 2 && is_gated(kActivation) && kBlocks <= 2 && kShape.staging_buffers == 2);

  public:
    using Arguments = GluBackwardArguments;
    static constexpr int kHalves = 1;
    static constexpr bool kCrowded = false;

    __device__ __forceinline__ GluBackwardEpilogue(const Arguments& arguments, uint32_t staging)
        : arguments_(arguments), store_(warp_.staging(staging)) {}

    __device__ __forceinline__ void begin(const OutputTile& tile) {
        const int row = min(warp_.row(min(warp_.lane / 16, kBlocks - 1)) + warp_.lane % 16, tile.rows - 1);
        const int32_t position = tile.row + row;
        gate_ = __ldg(arguments_.gates + __ldg(arguments_.slot_order + position));
        // Each lane one row's lines, of gates and of ups; rows of one block are shared by two lanes.
        constexpr int kLine = 128 / sizeof(Element);
        const Element* const z = z_row(arguments_.z, position);
        const int half = arguments_.layout == GluLayout::kInterleaved ? kShape.n : arguments_.width;
        const int first = tile.column * kShape.n * (arguments_.layout == GluLayout::kInterleaved ? 2 : 1);
#pragma unroll
        for (int line = 0; line < kShape.n / kLine; ++line) {
            const int column = first + line * kLine;
            if (column + half < 2 * arguments_.width) {
                if (kBlocks == 2 || warp_.lane < 16) ptx::prefetch_l2(z + column);
                if (kBlocks == 2 || warp_.lane >= 16) ptx::prefetch_l2(z + column + half);
            }
        }
    }

    __device__ __forceinline__ void look_ahead(const OutputTile& tile) { load_z(0, tile); }

    template <typename Sums>
    __device__ __forceinline__ void run(const Sums& sums, const OutputTile& tile) {
        float dots[kPasses];
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const int block = unit / kParts, part = unit % kParts;
            if (part == 0) {
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass)
                    dots[pass] = 0.0f;
            }
            const float (&s)[kShape.n / 2] = sums[block];
            store_.stage([&](int j) {
                const int i = (part * 8 + j) * 4;
                return make_uint2(pack<Element>(s[i], s[i + 1]), pack<Element>(s[i + 2], s[i + 3]));
            });
            __syncwarp();
            if (unit + 1 < kUnits) load_z(unit + 1, tile);
            const int column = lane_column(unit, tile);
            const bool inside = column < arguments_.width;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int row = warp_.row(block) + lane_row(pass);
                const uint4 grad = store_.load_staged(lane_row(pass), warp_.lane % kRowLanes);
                const float dot = finish_vector(unit, pass, grad, row < tile.rows && inside, tile.row + row, column);
                dots[pass] += inside ? dot : 0.0f;
            }
            store_.next();
            if (part == kParts - 1 && arguments_.gate_partials != nullptr) write_dots(dots, block, tile);
        }
    }

    __device__ __forceinline__ void finish(int32_t first_sentinel, int32_t num_slots) {
        const int warp = warp_.index_in_grid(), warps = warp_.warps_in_grid(), width = arguments_.width;
        const auto zero_rows = [&](void* rows, int columns) {
            if (rows == nullptr) return;
            zero_sentinel_rows(static_cast<Element*>(rows), columns, columns, RowMap{}, first_sentinel, num_slots, warp,
                               warps);
        };
        zero_rows(arguments_.gated_hidden, width);
        zero_rows(arguments_.grad_z, 2 * width);
    }

  private:
    __device__ __forceinline__ int lane_row(int pass) const { return pass * kPassRows + warp_.lane / kRowLanes; }
    __device__ __forceinline__ int lane_column(int unit, const OutputTile& tile) const {
        return tile.column * kShape.n + unit % kParts * kUnitColumns + warp_.lane % kRowLanes * kVector;
    }

    __device__ __forceinline__ const Element* z_row(const void* z, int32_t position) const {
        return static_cast<const Element*>(z) + int64_t{position} * (2 * arguments_.width);
    }

    // Where the vectors of gates and ups are in a row; interleaved: the first and the second half of both.
    struct Columns {
        int gate;
        int up;
    };
    __device__ __forceinline__ Columns z_columns(int column) const {
        if (arguments_.layout == GluLayout::kInterleaved) return {2 * column, 2 * column + kVector};
        if (arguments_.layout == GluLayout::kUpGate) return {arguments_.width + column, column};
        return {column, arguments_.width + column};
    }

    // Past the rows or columns, those of the last: their results are not stored.
    __device__ __forceinline__ void load_z(int unit, const OutputTile& tile) {
        const Columns columns = z_columns(min(lane_column(unit, tile), arguments_.width - kVector));
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = min(warp_.row(unit / kParts) + lane_row(pass), tile.rows - 1);
            const Element* const z = z_row(arguments_.z, tile.row + row);
            z_gate_[unit % 2][pass] = ptx::load_global_streaming(z + columns.gate);
            z_up_[unit % 2][pass] = ptx::load_global_streaming(z + columns.up);
        }
    }

    // Eight columns of a row: returns <dA', act(z)>.
    __device__ __forceinline__ float finish_vector(int unit, int pass, const uint4& grad_vector, bool stores,
                                                   int32_t position, int column) {
        uint32_t grad[4] = {grad_vector.x, grad_vector.y, grad_vector.z, grad_vector.w};
        uint32_t z_gate[4], z_up[4], grad_gate[4], grad_up[4], hidden[4];
        to_words(z_gate_[unit % 2][pass], z_gate);
        to_words(z_up_[unit % 2][pass], z_up);
        if (arguments_.layout == GluLayout::kInterleaved) split(z_gate, z_up);
        const float gate = __shfl_sync(kFullWarp, gate_, unit / kParts * 16 + lane_row(pass));
        float dot = 0.0f;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const float2 g = unpack<Element>(z_gate[word]), u = unpack<Element>(z_up[word]);
            const float2 da = unpack<Element>(grad[word]);
            const auto low = activate(g.x, u.x), high = activate(g.y, u.y);
            const float scaled_low = gate * da.x, scaled_high = gate * da.y;
            grad_gate[word] = pack<Element>(scaled_low * low.dgate, scaled_high * high.dgate);
            grad_up[word] = pack<Element>(scaled_low * low.dup, scaled_high * high.dup);
            hidden[word] = pack<Element>(gate * low.h, gate * high.h);
            dot += da.x * low.h + da.y * high.h;
        }
        if (arguments_.layout == GluLayout::kInterleaved) merge(grad_gate, grad_up);
        if (stores && arguments_.gated_hidden != nullptr) {
            store(hidden,
                  static_cast<Element*>(arguments_.gated_hidden) + int64_t{position} * arguments_.width + column);
        }
        if (stores && arguments_.grad_z != nullptr) {
            Element* const row = static_cast<Element*>(arguments_.grad_z) + int64_t{position} * (2 * arguments_.width);
            const Columns columns = z_columns(column);
            store(grad_gate, row + columns.gate);
            store(grad_up, row + columns.up);
        }
        return dot;
    }

    // Over the eight lanes of a row, always in the same order.
    __device__ __forceinline__ void write_dots(float (&dots)[kPasses], int block, const OutputTile& tile) const {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
            for (int offset = 1; offset < kRowLanes; offset *= 2)
                dots[pass] += __shfl_xor_sync(kFullWarp, dots[pass], offset);
            const int row = warp_.row(block) + lane_row(pass);
            if (warp_.lane % kRowLanes == 0 && row < tile.rows) {
                arguments_.gate_partials[int64_t{tile.column} * arguments_.num_slots + tile.row + row] = dots[pass];
            }
        }
    }

    __device__ __forceinline__ GatedValue<float> activate(float gate, float up) const {
        return gated_activation<kActivation, float>(gate, up, arguments_.alpha, arguments_.limit);
    }

    __device__ __forceinline__ static void to_words(const uint4& vector, uint32_t (&words)[4]) {
        words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
    }
    __device__ __forceinline__ static void store(const uint32_t (&words)[4], Element* to) {
        ptx::store_global_streaming(to, words[0], words[1], words[2], words[3]);
    }

    // Sixteen columns, gates and ups in turns, to eight of either kind, and back.
    static constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
    __device__ __forceinline__ static void split(uint32_t (&low)[4], uint32_t (&high)[4]) {
        const uint32_t all[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low[i] = __byte_perm(all[2 * i], all[2 * i + 1], kLowHalves);
            high[i] = __byte_perm(all[2 * i], all[2 * i + 1], kHighHalves);
        }
    }
    __device__ __forceinline__ static void merge(uint32_t (&low)[4], uint32_t (&high)[4]) {
        uint32_t all[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            all[2 * i] = __byte_perm(low[i], high[i], kLowHalves);
            all[2 * i + 1] = __byte_perm(low[i], high[i], kHighHalves);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            low[i] = all[i], high[i] = all[4 + i];
    }

    const Arguments& arguments_;
    ConsumerWarp<kTile> warp_;
    Store store_;
    float gate_;  // of the warp's row `lane`
    uint4 z_gate_[2][kPasses];
    uint4 z_up_[2][kPasses];
};

}  // namespace scattermoe::kernels::sm90
