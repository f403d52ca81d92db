#pragma once

// The epilogue of dA' = dO W_down that goes on through a gated activation.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../activation.h"
#include "../ptx/global_memory.h"
#include "../ptx/stmatrix.h"
#include "epilogue.h"

namespace scattermoe::kernels::sm90 {

// A thread's part of the activation's backward: eight columns of a row, of which z has gates and ups.
template <typename Element, Activation kActivation>
class GluBackwardVectors {
    static_assert(sizeof(Element) == 2 && is_gated(kActivation));

  public:
    static constexpr int kVector = kVectorBytes / sizeof(Element);

    struct Z {
        uint4 gate;
        uint4 up;
    };

    __device__ __forceinline__ explicit GluBackwardVectors(const GluBackwardArguments& arguments) : p(arguments) {}

    // f(whether gates and ups take turns, as a constant)
    template <typename F>
    __device__ __forceinline__ void dispatch_layout(F&& f) const {
        if (p.layout == GluLayout::kInterleaved) {
            f(std::true_type{});
        } else {
            f(std::false_type{});
        }
    }

    template <bool kInterleaved>
    __device__ __forceinline__ Z load_z(int32_t position, int column) const {
        const Element* const row = z_row(p.z, position);
        const Columns at = z_columns<kInterleaved>(column);
        return {ptx::load_global_streaming(row + at.gate), ptx::load_global_streaming(row + at.up)};
    }

    // Sends for the lines of a row from `first` on that hold what belongs to kColumns columns.
    template <int kColumns>
    __device__ __forceinline__ void prefetch_z(int32_t position, int first, bool gates = true, bool ups = true) const {
        constexpr int kLine = 128 / sizeof(Element);
        const bool interleaved = p.layout == GluLayout::kInterleaved;
        const Element* const row = z_row(p.z, position);
        const int half = interleaved ? kColumns : p.width;
#pragma unroll
        for (int line = 0; line < kColumns / kLine; ++line) {
            const int column = first * (interleaved ? 2 : 1) + line * kLine;
            if (column + half < 2 * p.width) {
                if (gates) ptx::prefetch_l2(row + column);
                if (ups) ptx::prefetch_l2(row + column + half);
            }
        }
    }

    // Stores what becomes of dA' and z where `stores`; returns <dA', act(z)>.
    template <bool kInterleaved>
    __device__ __forceinline__ float finish(const uint4& grad_vector, const Z& z, float gate, bool stores,
                                            int32_t position, int column) const {
        uint32_t grad[4], z_gate[4], z_up[4], grad_gate[4], grad_up[4], hidden[4];
        to_words(grad_vector, grad);
        to_words(z.gate, z_gate);
        to_words(z.up, z_up);
        if constexpr (kInterleaved) split(z_gate, z_up);
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
        if constexpr (kInterleaved) merge(grad_gate, grad_up);
        if (stores && p.gated_hidden != nullptr) {
            store(hidden, static_cast<Element*>(p.gated_hidden) + int64_t{position} * p.width + column);
        }
        if (stores && p.grad_z != nullptr) {
            Element* const row = static_cast<Element*>(p.grad_z) + int64_t{position} * (2 * p.width);
            const Columns at = z_columns<kInterleaved>(column);
            store(grad_gate, row + at.gate);
            store(grad_up, row + at.up);
        }
        return dot;
    }

    __device__ __forceinline__ float gate(int32_t position) const {
        return __ldg(p.gates + __ldg(p.slot_order + position));
    }
    // Adds the sums of the lanes of a row, kRowLanes that follow each other, always in the same order.
    template <int kRowLanes>
    __device__ __forceinline__ void write_dot(float dot, bool stores, int tile_column, int32_t position) const {
#pragma unroll
        for (int offset = 1; offset < kRowLanes; offset *= 2)
            dot += __shfl_xor_sync(kFullWarp, dot, offset);
        if (stores && threadIdx.x % kRowLanes == 0) {
            p.gate_partials[int64_t{tile_column} * p.num_slots + position] = dot;
        }
    }

    // The rows of sentinels.
    __device__ __forceinline__ void zero_rows(int32_t first_sentinel, int32_t num_slots, int warp, int warps) const {
        const auto zero = [&](void* rows, int columns) {
            if (rows == nullptr) return;
            zero_sentinel_rows(static_cast<Element*>(rows), columns, columns, RowMap{}, first_sentinel, num_slots, warp,
                               warps);
        };
        zero(p.gated_hidden, p.width);
        zero(p.grad_z, 2 * p.width);
    }

  private:
    // Where the vectors of gates and ups are in a row; interleaved: the first and the second half of both.
    struct Columns {
        int gate;
        int up;
    };
    template <bool kInterleaved>
    __device__ __forceinline__ Columns z_columns(int column) const {
        if constexpr (kInterleaved) return {2 * column, 2 * column + kVector};
        const int gate = p.layout == GluLayout::kUpGate ? p.width : 0;
        return {gate + column, p.width - gate + column};
    }
    __device__ __forceinline__ const Element* z_row(const void* z, int32_t position) const {
        return static_cast<const Element*>(z) + int64_t{position} * (2 * p.width);
    }

    __device__ __forceinline__ GatedValue<float> activate(float gate, float up) const {
        return gated_activation<kActivation, float>(gate, up, p.alpha, p.limit);
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

    const GluBackwardArguments& p;
};

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
    using Vectors = GluBackwardVectors<Element, kActivation>;
    static constexpr int kRowLanes = kUnitColumns / Vectors::kVector;
    static constexpr int kPassRows = kWarpSize / kRowLanes;
    static constexpr int kPasses = 16 / kPassRows;
    using Store = StagedStore<Element, kUnitColumns, kShape.staging_buffers>;
    static_assert(kBlocks <= 2 && kShape.staging_buffers == 2);

  public:
    using Arguments = GluBackwardArguments;
    static constexpr int kHalves = 1;
    static constexpr bool kCrowded = false;

    __device__ __forceinline__ GluBackwardEpilogue(const Arguments& arguments, uint32_t staging)
        : arguments_(arguments), vectors_(arguments), store_(warp_.staging(staging)) {}

    // Each lane one row's gate and lines; rows of one block are shared by two lanes.
    __device__ __forceinline__ void begin(const OutputTile& tile) {
        const int row = min(warp_.row(min(warp_.lane / 16, kBlocks - 1)) + warp_.lane % 16, tile.rows - 1);
        const int32_t position = tile.row + max(row, 0);
        gate_ = vectors_.gate(position);
        vectors_.template prefetch_z<kShape.n>(position, tile.column * kShape.n, kBlocks == 2 || warp_.lane < 16,
                                               kBlocks == 2 || warp_.lane >= 16);
    }

    __device__ __forceinline__ void look_ahead(const OutputTile& tile) {
        vectors_.dispatch_layout([&](auto interleaved) { load_z<interleaved.value>(0, tile); });
    }

    template <typename Sums>
    __device__ __forceinline__ void run(const Sums& sums, const OutputTile& tile) {
        vectors_.dispatch_layout([&](auto interleaved) { run<interleaved.value>(sums, tile); });
    }

    __device__ __forceinline__ void finish(int32_t first_sentinel, int32_t num_slots) {
        vectors_.zero_rows(first_sentinel, num_slots, warp_.index_in_grid(), warp_.warps_in_grid());
    }

  private:
    template <bool kInterleaved, typename Sums>
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
            if (unit + 1 < kUnits) load_z<kInterleaved>(unit + 1, tile);
            const int column = lane_column(unit, tile);
            const bool inside = column < arguments_.width;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int row = warp_.row(block) + lane_row(pass);
                const uint4 grad = store_.load_staged(lane_row(pass), warp_.lane % kRowLanes);
                const float gate = __shfl_sync(kFullWarp, gate_, block * 16 + lane_row(pass));
                const float dot = vectors_.template finish<kInterleaved>(
                    grad, z_[unit % 2][pass], gate, row < tile.rows && inside, tile.row + row, column);
                dots[pass] += inside ? dot : 0.0f;
            }
            store_.next();
            if (part == kParts - 1 && arguments_.gate_partials != nullptr) {
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass) {
                    const int row = warp_.row(block) + lane_row(pass);
                    vectors_.template write_dot<kRowLanes>(dots[pass], row < tile.rows, tile.column, tile.row + row);
                }
            }
        }
    }

    __device__ __forceinline__ int lane_row(int pass) const { return pass * kPassRows + warp_.lane / kRowLanes; }
    __device__ __forceinline__ int lane_column(int unit, const OutputTile& tile) const {
        return tile.column * kShape.n + unit % kParts * kUnitColumns + warp_.lane % kRowLanes * Vectors::kVector;
    }

    // Past the rows or columns, those of the last: their results are not stored.
    template <bool kInterleaved>
    __device__ __forceinline__ void load_z(int unit, const OutputTile& tile) {
        const int column = min(lane_column(unit, tile), arguments_.width - Vectors::kVector);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = min(warp_.row(unit / kParts) + lane_row(pass), tile.rows - 1);
            z_[unit % 2][pass] = vectors_.template load_z<kInterleaved>(tile.row + row, column);
        }
    }

    const Arguments& arguments_;
    Vectors vectors_;
    ConsumerWarp<kTile> warp_;
    Store store_;
    float gate_;  // of the warp's row `lane`
    typename Vectors::Z z_[2][kPasses];
};

}  // namespace scattermoe::kernels::sm90
