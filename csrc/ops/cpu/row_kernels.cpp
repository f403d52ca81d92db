#include "row_kernels.h"

#include <algorithm>

#include "simd_clones.h"

namespace scattermoe::cpu {

namespace {

// x rounded to T. c10's conversion to bfloat16 branches on NaN, which keeps the loops it stands in from vectorising.
template <typename T>
SCATTERMOE_INLINE T round_to(Compute<T> x) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, x);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        const uint32_t nan = 0x7fc0;
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        return c10::BFloat16(static_cast<uint16_t>(is_nan ? nan : rounded), c10::BFloat16::from_bits());
    } else {
        return static_cast<T>(x);
    }
}

// Columns of the gate and up halves of a pre-activation row: base pointer offsets and the distance between neighbours.
struct GluColumns {
    int64_t gate;
    int64_t up;
    int64_t stride;
};

SCATTERMOE_INLINE GluColumns glu_columns(GluLayout layout, int64_t hidden) {
    switch (layout) {
        case GluLayout::kGateUp:
            return {0, hidden, 1};
        case GluLayout::kUpGate:
            return {hidden, 0, 1};
        case GluLayout::kInterleaved:
            return {0, 1, 2};
    }
    return {0, hidden, 1};
}

template <typename T>
SCATTERMOE_INLINE void weighted_sum_loop(Compute<T>* sum, const T* const* rows, const Compute<T>* scales,
                                         int64_t num_rows, int64_t width) {
    using C = Compute<T>;
    for (int64_t c = 0; c < width; ++c)
        sum[c] = C(0);
    for (int64_t i = 0; i < num_rows; ++i) {
        const T* row = rows[i];
        const C scale = scales ? scales[i] : C(1);
        for (int64_t c = 0; c < width; ++c)
            sum[c] += scale * static_cast<C>(row[c]);
    }
}

template <typename T>
SCATTERMOE_INLINE Compute<T> dot_loop(const T* a, const T* b, int64_t width) {
    using C = Compute<T>;
    C sum = C(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width; ++c)
        sum += static_cast<C>(a[c]) * static_cast<C>(b[c]);
    return sum;
}

template <Activation A, int64_t kStride, typename T>
SCATTERMOE_INLINE void gated_forward_loop(T* h, const T* gate, const T* up, Compute<T> alpha, Compute<T> limit,
                                          int64_t hidden) {
    using C = Compute<T>;
#pragma omp simd
    for (int64_t c = 0; c < hidden; ++c) {
        h[c] = round_to<T>(
            gated_activation<A, C>(static_cast<C>(gate[c * kStride]), static_cast<C>(up[c * kStride]), alpha, limit).h);
    }
}

template <Activation A, typename T>
SCATTERMOE_INLINE void forward_loop(const ActivationParams& params, T* h, const T* z, int64_t hidden) {
    using C = Compute<T>;
    if constexpr (is_gated(A)) {
        const GluColumns columns = glu_columns(params.layout, hidden);
        const C alpha = static_cast<C>(params.alpha), limit = static_cast<C>(params.limit);
        if (columns.stride == 1) {
            gated_forward_loop<A, 1>(h, z + columns.gate, z + columns.up, alpha, limit, hidden);
        } else {
            gated_forward_loop<A, 2>(h, z + columns.gate, z + columns.up, alpha, limit, hidden);
        }
    } else {
#pragma omp simd
        for (int64_t c = 0; c < hidden; ++c)
            h[c] = round_to<T>(nonlinearity<A, C>(static_cast<C>(z[c])).f);
    }
}

template <Activation A, int64_t kStride, bool kWriteH, typename T>
SCATTERMOE_INLINE Compute<T> gated_backward_loop(T* dgate, T* dup, T* gated_h, const T* gate, const T* up, const T* dh,
                                                 Compute<T> slot_gate, Compute<T> alpha, Compute<T> limit,
                                                 int64_t hidden) {
    using C = Compute<T>;
    C sum = C(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < hidden; ++c) {
        const GatedValue<C> v =
            gated_activation<A, C>(static_cast<C>(gate[c * kStride]), static_cast<C>(up[c * kStride]), alpha, limit);
        const C d = static_cast<C>(dh[c]);
        sum += d * v.h;
        dgate[c * kStride] = round_to<T>(slot_gate * d * v.dgate);
        dup[c * kStride] = round_to<T>(slot_gate * d * v.dup);
        if constexpr (kWriteH) gated_h[c] = round_to<T>(slot_gate * v.h);
    }
    return sum;
}

template <Activation A, bool kWriteH, typename T>
SCATTERMOE_INLINE Compute<T> backward_loop(const ActivationParams& params, T* dz, T* gated_h, const T* z, const T* dh,
                                           Compute<T> slot_gate, int64_t hidden) {
    using C = Compute<T>;
    if constexpr (is_gated(A)) {
        const GluColumns columns = glu_columns(params.layout, hidden);
        const C alpha = static_cast<C>(params.alpha), limit = static_cast<C>(params.limit);
        if (columns.stride == 1) {
            return gated_backward_loop<A, 1, kWriteH>(dz + columns.gate, dz + columns.up, gated_h, z + columns.gate,
                                                      z + columns.up, dh, slot_gate, alpha, limit, hidden);
        }
        return gated_backward_loop<A, 2, kWriteH>(dz + columns.gate, dz + columns.up, gated_h, z + columns.gate,
                                                  z + columns.up, dh, slot_gate, alpha, limit, hidden);
    } else {
        C sum = C(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < hidden; ++c) {
            const activation_math::Value<C> v = nonlinearity<A, C>(static_cast<C>(z[c]));
            const C d = static_cast<C>(dh[c]);
            sum += d * v.f;
            dz[c] = round_to<T>(slot_gate * d * v.df);
            if constexpr (kWriteH) gated_h[c] = round_to<T>(slot_gate * v.f);
        }
        return sum;
    }
}

}  // namespace

// target_clones takes plain functions, so each dtype's specialisation is spelled out around the inlined loops.
#define SCATTERMOE_ROW_KERNELS(T)                                                                                 \
    template <>                                                                                                   \
    SCATTERMOE_SIMD_CLONES void weighted_sum<T>(Compute<T> * sum, const T* const* rows, const Compute<T>* scales, \
                                                int64_t num_rows, int64_t width) {                                \
        weighted_sum_loop<T>(sum, rows, scales, num_rows, width);                                                 \
    }                                                                                                             \
    template <>                                                                                                   \
    SCATTERMOE_SIMD_CLONES void round_row<T>(T * y, const Compute<T>* x, int64_t width) {                         \
        for (int64_t c = 0; c < width; ++c)                                                                       \
            y[c] = round_to<T>(x[c]);                                                                             \
    }                                                                                                             \
    template <>                                                                                                   \
    SCATTERMOE_SIMD_CLONES void scale_row<T>(T * y, const T* x, Compute<T> scale, int64_t width) {                \
        for (int64_t c = 0; c < width; ++c)                                                                       \
            y[c] = round_to<T>(scale * static_cast<Compute<T>>(x[c]));                                            \
    }                                                                                                             \
    template <>                                                                                                   \
    SCATTERMOE_SIMD_CLONES Compute<T> dot<T>(const T* a, const T* b, int64_t width) {                             \
        return dot_loop<T>(a, b, width);                                                                          \
    }

SCATTERMOE_ROW_KERNELS(double)
SCATTERMOE_ROW_KERNELS(float)
SCATTERMOE_ROW_KERNELS(c10::BFloat16)
SCATTERMOE_ROW_KERNELS(c10::Half)

#undef SCATTERMOE_ROW_KERNELS

#define SCATTERMOE_ACTIVATION_KERNELS(T)                                                                             \
    template <>                                                                                                      \
    SCATTERMOE_SIMD_CLONES void activation_forward<T>(const ActivationParams& params, T* h, const T* z,              \
                                                      int64_t hidden) {                                              \
        dispatch_activation(params.activation, [&](auto a) __attribute__((always_inline)) {                          \
            forward_loop<decltype(a)::value, T>(params, h, z, hidden);                                               \
        });                                                                                                          \
    }                                                                                                                \
    template <>                                                                                                      \
    SCATTERMOE_SIMD_CLONES T activation_backward<T>(const ActivationParams& params, T* dz, T* gated_h, const T* z,   \
                                                    const T* dh, T gate, int64_t hidden) {                           \
        T dgate = 0;                                                                                                 \
        dispatch_activation(params.activation, [&](auto a) __attribute__((always_inline)) {                          \
            dgate = gated_h ? backward_loop<decltype(a)::value, true, T>(params, dz, gated_h, z, dh, gate, hidden)   \
                            : backward_loop<decltype(a)::value, false, T>(params, dz, gated_h, z, dh, gate, hidden); \
        });                                                                                                          \
        return dgate;                                                                                                \
    }

SCATTERMOE_ACTIVATION_KERNELS(double)
SCATTERMOE_ACTIVATION_KERNELS(float)

#undef SCATTERMOE_ACTIVATION_KERNELS

namespace {

// Rows of a 16-bit type go through the activations of float in pieces of this many columns, widened on the stack: one
// set of loops to compile, which vectorises.
constexpr int64_t kPiece = 256;

// Calls f(piece, row, count) for the runs of pre-activation columns that belong to the hidden columns [begin, begin +
// count): where they start in a piece of `count` hidden columns and in the whole row. A piece has the row's layout.
template <typename F>
void for_each_run(const ActivationParams& params, int64_t begin, int64_t count, int64_t hidden, const F& f) {
    if (!is_gated(params.activation)) {
        f(0, begin, count);
    } else if (params.layout == GluLayout::kInterleaved) {
        f(0, 2 * begin, 2 * count);
    } else {
        f(0, begin, count);
        f(count, hidden + begin, count);
    }
}

}  // namespace

template <typename T>
void activation_forward(const ActivationParams& params, T* h, const T* z, int64_t hidden) {
    float z_piece[2 * kPiece], h_piece[kPiece];
    for (int64_t begin = 0; begin < hidden; begin += kPiece) {
        const int64_t count = std::min(kPiece, hidden - begin);
        for_each_run(params, begin, count, hidden, [&](int64_t piece, int64_t row, int64_t length) {
            widen_row<T>(z_piece + piece, z + row, length);
        });
        activation_forward<float>(params, h_piece, z_piece, count);
        round_row<T>(h + begin, h_piece, count);
    }
}

template <typename T>
Compute<T> activation_backward(const ActivationParams& params, T* dz, T* gated_h, const T* z, const T* dh,
                               Compute<T> gate, int64_t hidden) {
    float z_piece[2 * kPiece], dz_piece[2 * kPiece], dh_piece[kPiece], h_piece[kPiece];
    float dgate = 0;
    for (int64_t begin = 0; begin < hidden; begin += kPiece) {
        const int64_t count = std::min(kPiece, hidden - begin);
        for_each_run(params, begin, count, hidden, [&](int64_t piece, int64_t row, int64_t length) {
            widen_row<T>(z_piece + piece, z + row, length);
        });
        widen_row<T>(dh_piece, dh + begin, count);
        dgate +=
            activation_backward<float>(params, dz_piece, gated_h ? h_piece : nullptr, z_piece, dh_piece, gate, count);
        for_each_run(params, begin, count, hidden, [&](int64_t piece, int64_t row, int64_t length) {
            round_row<T>(dz + row, dz_piece + piece, length);
        });
        if (gated_h) round_row<T>(gated_h + begin, h_piece, count);
    }
    return dgate;
}

#define SCATTERMOE_16_BIT_KERNELS(T)                                                                                  \
    template <>                                                                                                       \
    SCATTERMOE_SIMD_CLONES void widen_row<T>(float* y, const T* x, int64_t width) {                                   \
        for (int64_t c = 0; c < width; ++c)                                                                           \
            y[c] = static_cast<float>(x[c]);                                                                          \
    }                                                                                                                 \
    template void activation_forward<T>(const ActivationParams& params, T* h, const T* z, int64_t hidden);            \
    template float activation_backward<T>(const ActivationParams& params, T* dz, T* gated_h, const T* z, const T* dh, \
                                          float gate, int64_t hidden);

SCATTERMOE_16_BIT_KERNELS(c10::BFloat16)
SCATTERMOE_16_BIT_KERNELS(c10::Half)

#undef SCATTERMOE_16_BIT_KERNELS

}  // namespace scattermoe::cpu
