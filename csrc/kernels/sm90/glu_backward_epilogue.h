#pragma once

// The epilogue of dA' = dO W_down that goes on through a gated activation.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../activation.h"
#include "../ptx/elect.h"
#include "../ptx/fence.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mbarrier.h"
#include "../ptx/shared_memory.h"
#include "../ptx/stmatrix.h"
#include "../ptx/tma.h"
#include "epilogue.h"
#include "pipeline.h"

namespace scattermoe::kernels::sm90 {

// z comes the way the operands do: a tile's last products are followed in the ring by stages that hold gates and ups of
// 64 columns each, for all of the tile's rows. ldmatrix gives them to the lanes as the accumulators lie. grad_z takes
// z's place in the stage, gated_hidden the place of the rows, and the copy engine takes them from there; a stage is
// empty once it has.
template <typename Element, Tile kTile, Activation kActivation>
class GluBackwardEpilogue {
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr int kPartColumns = 64;
    static constexpr int kParts = kShape.n / kPartColumns;
    static constexpr int kHalfBytes = kShape.m * kPartColumns * 2;
    using Layout = SharedLayout<kTile>;
    using Ring = Pipeline<Layout::kStages, kShape.paired>;
    static_assert(sizeof(Element) == 2 && is_gated(kActivation));
    static_assert(!kShape.ping_pong && kShape.consumer_blocks() == 1);
    static_assert(2 * kHalfBytes <= kShape.b_bytes() && kHalfBytes <= kShape.a_bytes());

  public:
    using Arguments = GluBackwardArguments;
    static constexpr int kHalves = 1;
    static constexpr bool kCrowded = false, kHasInput = true, kHolds = false;

    // ---- The producer's side ----

    __device__ __forceinline__ static int columns(const Arguments& p, const OutputTile& tile) {
        return min(kShape.n, p.width - tile.column * kShape.n);
    }
    // Stages that follow those of the products.
    __device__ __forceinline__ static int stages(const Arguments& p, const OutputTile& tile) {
        return (columns(p, tile) + kPartColumns - 1) / kPartColumns;
    }
    // One thread.
    __device__ __forceinline__ static void load(const Arguments& p, const OutputTile& tile, int part, uint32_t shared,
                                                int stage, uint32_t full) {
        const Place place(p, tile, part);
        const uint32_t to = z_stage(shared, stage);
        ptx::mbarrier_arrive_expect_bytes(full, 2 * kHalfBytes);
        ptx::tma_load(to, p.z_map, full, place.first, place.first_half, tile.row);
        ptx::tma_load(to + kHalfBytes, p.z_map, full, place.second, place.second_half, tile.row);
    }

    // ---- The consumers' ----

    __device__ __forceinline__ GluBackwardEpilogue(const Arguments& arguments, uint32_t) : p(arguments) {
        const int row = warp_.lane % 16;
        lane_offset_ = row * 128 + (warp_.lane / 16 ^ row & 7) * 16;
        asm volatile("" : "+r"(lane_offset_));  // the compiler would else hold all that it is combined with
    }

    // In two steps, like GatheredMatrix: long before the tile, what memory says of its rows ...
    __device__ __forceinline__ void look_ahead(const OutputTile& tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = warp_.row(0) + warp_.lane / 4 + i * 8;
            next_slots_[i] = __ldg(p.slot_order + tile.row + max(min(row, tile.rows - 1), 0));
        }
    }
    // ... and long before its epilogue, their gates.
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            slots_[i] = next_slots_[i];
            gates_[i] = __ldg(p.gates + slots_[i]);
        }
    }

    // Of the tile's first kColumns columns, no others being within the matrix.
    template <int kColumns, typename Sums>
    __device__ __forceinline__ void run(const Sums& sums, const OutputTile& tile, const Ring& ring,
                                        typename Ring::Position& at, uint32_t shared) {
        if (p.layout == GluLayout::kInterleaved) {
            run_parts<kColumns / kPartColumns, true>(sums[0], tile, ring, at, shared);
        } else {
            run_parts<kColumns / kPartColumns, false>(sums[0], tile, ring, at, shared);
        }
    }

    // Releases the stage that the warp's last stores are from, once they have been read. What comes next may need it.
    __device__ __forceinline__ void settle(const Ring& ring) {
        if (lent_ < 0) return;
        if (ptx::elect()) ptx::tma_store_wait_read<0>();
        __syncwarp();
        ring.release(lent_, warp_.lane);
        lent_ = -1;
    }

    __device__ __forceinline__ void finish(int32_t first_sentinel, int32_t num_slots) {
        zero_rows(p.gated_hidden, p.width, first_sentinel, num_slots);
        zero_rows(p.grad_z, 2 * p.width, first_sentinel, num_slots);
        if (p.grad_gates != nullptr) {
            const int first = warp_.index_in_grid() * kWarpSize + warp_.lane;
            for (int32_t i = first_sentinel + first; i < num_slots; i += warp_.warps_in_grid() * kWarpSize)
                p.grad_gates[p.slot_order[i]] = 0.0f;
        }
        if (ptx::elect()) ptx::tma_store_wait_all();
    }

  private:
    // Where a part's gates and ups are in a row of z; interleaved: the first and the second half of both.
    struct Place {
        int column;  // of the hidden state
        int first, first_half;
        int second, second_half;

        __device__ __forceinline__ Place(const Arguments& p, const OutputTile& tile, int part)
            : column(tile.column * kShape.n + part * kPartColumns) {
            const bool interleaved = p.layout == GluLayout::kInterleaved;
            first = interleaved ? 2 * column : column;
            second = interleaved ? first + kPartColumns : column;
            first_half = p.layout == GluLayout::kUpGate ? 1 : 0;
            second_half = p.layout == GluLayout::kGateUp ? 1 : 0;
        }
    };

    __device__ __forceinline__ static uint32_t z_stage(uint32_t shared, int stage) {
        return shared + Layout::kB + stage * kShape.b_bytes();
    }
    __device__ __forceinline__ static uint32_t hidden_stage(uint32_t shared, int stage) {
        return shared + stage * kShape.a_bytes();
    }

    template <int kMost, bool kInterleaved>
    __device__ __forceinline__ void run_parts(const float (&sums)[kShape.n / 2], const OutputTile& tile,
                                              const Ring& ring, typename Ring::Position& at, uint32_t shared) {
        constexpr int kStep = 16, kSteps = kPartColumns / kStep;  // columns
        const int row = warp_.row(0), valid = tile.rows - row, parts = stages(p, tile);
        float dots[2] = {0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < kMost; ++part) {
            if (part >= parts) break;
            ring.wait_full(at);
            if (valid > 0) {
                const uint32_t z = z_stage(shared, at.stage) + row * 128;
                const uint32_t hidden = hidden_stage(shared, at.stage) + row * 128;
                Columns columns[2];  // what is computed, and the next
                load_z<kInterleaved>(columns[0], z, 0);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    if (step + 1 < kSteps) load_z<kInterleaved>(columns[(step + 1) % 2], z, (step + 1) * 2);
                    const int first = (part * kSteps + step) * kStep / 2;
                    finish_columns<kInterleaved>(reinterpret_cast<const float (&)[8]>(sums[first]), columns[step % 2],
                                                 z, hidden, step * 2, dots);
                    // By now the stores of the part before have been read.
                    if (step == kSteps / 2 - 1) settle(ring);
                }
                send(Place(p, tile, part), tile.row + row, valid, z, hidden);
            } else {
                settle(ring);
            }
            lent_ = at.stage;
            at.advance();
        }
        if (p.gate_partials != nullptr || p.grad_gates != nullptr) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                dots[i] += __shfl_xor_sync(kFullWarp, dots[i], 1);
                dots[i] += __shfl_xor_sync(kFullWarp, dots[i], 2);
                const int offset = warp_.lane / 4 + i * 8;
                if (warp_.lane % 4 == 0 && offset < valid) {
                    if (p.grad_gates != nullptr) {
                        p.grad_gates[slots_[i]] = dots[i];
                    } else {
                        p.gate_partials[int64_t{tile.column} * p.num_slots + tile.row + row + offset] = dots[i];
                    }
                }
            }
        }
    }

    // Gates and ups of sixteen columns, of which a lane has four pairs: of row lane / 4 and the row eight below, and
    // again eight columns on.
    struct Columns {
        uint32_t gate[4];
        uint32_t up[4];
    };

    template <bool kInterleaved>
    __device__ __forceinline__ void finish_columns(const float (&grad)[8], Columns& columns, uint32_t z,
                                                   uint32_t hidden, int j, float (&dots)[2]) const {
        uint32_t (&gate)[4] = columns.gate, (&up)[4] = columns.up, gated[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 g = unpack<Element>(gate[i]), u = unpack<Element>(up[i]);
            const float2 da = {grad[2 * i], grad[2 * i + 1]};
            const auto low = activate(g.x, u.x), high = activate(g.y, u.y);
            const float scale = gates_[i % 2], scaled_low = scale * da.x, scaled_high = scale * da.y;
            gate[i] = pack<Element>(scaled_low * low.dgate, scaled_high * high.dgate);
            up[i] = pack<Element>(scaled_low * low.dup, scaled_high * high.dup);
            gated[i] = pack<Element>(scale * low.h, scale * high.h);
            dots[i % 2] += da.x * low.h;
            dots[i % 2] += da.y * high.h;
        }
        store_z<kInterleaved>(columns, z, j);
        ptx::stmatrix_x4(hidden + matrix_offset(j), gated[0], gated[1], gated[2], gated[3]);
    }

    // A lane's row address for the matrices of eight columns j and j + 1 of the warp's rows.
    __device__ __forceinline__ uint32_t matrix_offset(int j) const { return lane_offset_ ^ j * 16; }
    // Interleaved: of two gates and their ups, of which 64 columns have those of 32.
    __device__ __forceinline__ uint32_t pair_offset(int j, int i) const {
        const int row = warp_.lane / 4 + i % 2 * 8, block = j + i / 2;
        const int chunk = block % 4 * 2 + warp_.lane % 4 / 2;
        return block / 4 * kHalfBytes + row * 128 + (chunk ^ row & 7) * 16 + warp_.lane % 2 * 8;
    }

    static constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
    template <bool kInterleaved>
    __device__ __forceinline__ void load_z(Columns& columns, uint32_t z, int j) const {
        auto& [gate, up] = columns;
        if constexpr (kInterleaved) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint2 pair = ptx::load_shared_64(z + pair_offset(j, i));
                gate[i] = __byte_perm(pair.x, pair.y, kLowHalves);
                up[i] = __byte_perm(pair.x, pair.y, kHighHalves);
            }
        } else {
            ptx::ldmatrix_x4(gate, z + matrix_offset(j));
            ptx::ldmatrix_x4(up, z + matrix_offset(j) + kHalfBytes);
        }
    }
    template <bool kInterleaved>
    __device__ __forceinline__ void store_z(const Columns& columns, uint32_t z, int j) const {
        const auto& [gate, up] = columns;
        if constexpr (kInterleaved) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                ptx::store_shared_64(z + pair_offset(j, i), __byte_perm(gate[i], up[i], kLowHalves),
                                     __byte_perm(gate[i], up[i], kHighHalves));
            }
        } else {
            ptx::stmatrix_x4(z + matrix_offset(j), gate[0], gate[1], gate[2], gate[3]);
            ptx::stmatrix_x4(z + matrix_offset(j) + kHalfBytes, up[0], up[1], up[2], up[3]);
        }
    }

    // What the warp has left in the stage on its way to memory.
    __device__ __forceinline__ void send(const Place& place, int32_t row, int valid, uint32_t z,
                                         uint32_t hidden) const {
        ptx::fence_proxy_async();
        __syncwarp();
        if (valid >= 16) {
            if (ptx::elect()) {
                if (p.grad_z != nullptr) {
                    ptx::tma_store(p.grad_z_map, z, place.first, place.first_half, row);
                    ptx::tma_store(p.grad_z_map, z + kHalfBytes, place.second, place.second_half, row);
                }
                if (p.gated_hidden != nullptr) ptx::tma_store(p.gated_hidden_map, hidden, place.column, 0, row);
                ptx::tma_store_commit();
            }
            return;
        }
        const bool interleaved = p.layout == GluLayout::kInterleaved;
        const int half = interleaved ? 2 * p.width : p.width;  // columns
        store_rows(p.grad_z, 2 * p.width, place.first_half * p.width + place.first, half - place.first, row, valid, z);
        store_rows(p.grad_z, 2 * p.width, place.second_half * p.width + place.second, half - place.second, row, valid,
                   z + kHalfBytes);
        store_rows(p.gated_hidden, p.width, place.column, p.width - place.column, row, valid, hidden);
    }

    // The first `valid` of sixteen rows, from `column` on, of which there are `columns` before something else begins.
    __device__ __forceinline__ void store_rows(void* matrix, int stride, int column, int columns, int32_t row,
                                               int valid, uint32_t shared) const {
        if (matrix == nullptr) return;
        const int chunk = warp_.lane % 8;
        Element* const base = static_cast<Element*>(matrix) + int64_t{row} * stride + column + chunk * 8;
#pragma unroll
        for (int pass = 0; pass < 4; ++pass) {
            const int r = pass * 4 + warp_.lane / 8;
            if (r >= valid || chunk * 8 >= columns) continue;
            *reinterpret_cast<uint4*>(base + int64_t{r} * stride) =
                ptx::load_shared_128(shared + r * 128 + (chunk ^ r & 7) * 16);
        }
    }

    __device__ __forceinline__ void zero_rows(void* rows, int columns, int32_t first_sentinel,
                                              int32_t num_slots) const {
        if (rows == nullptr) return;
        zero_sentinel_rows(static_cast<Element*>(rows), columns, columns, RowMap{}, first_sentinel, num_slots,
                           warp_.index_in_grid(), warp_.warps_in_grid());
    }

    // silu' = s + silu (1 - s), with s the sigmoid: what the difference loses where s is close to one is far less than
    // rounding to 16 bits does, and two instructions are saved that nonlinearity() has for float32.
    __device__ __forceinline__ static GatedValue<float> activate(float gate, float up) {
        static_assert(kActivation == Activation::kSwiglu);
        const float s = activation_math::sigmoid(gate), f = gate * s;
        return {f * up, (s + f * (1.0f - s)) * up, f};
    }

    const Arguments& p;
    ConsumerWarp<kTile> warp_;
    uint32_t lane_offset_;
    int32_t slots_[2], next_slots_[2];  // of the lane's rows, in this tile and the next
    float gates_[2];
    int lent_ = -1;  // the stage that the last stores are from, unless it is released
};

}  // namespace scattermoe::kernels::sm90
