#include "row_kernels.h"

#include "simd_clones.h"

namespace scattermoe::cpu {

namespace {

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
        h[c] = static_cast<T>(
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
            h[c] = static_cast<T>(nonlinearity<A, C>(static_cast<C>(z[c])).f);
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
        dgate[c * kStride] = static_cast<T>(slot_gate * d * v.dgate);
        dup[c * kStride] = static_cast<T>(slot_gate * d * v.dup);
        if constexpr (kWriteH) gated_h[c] = static_cast<T>(slot_gate * v.h);
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
            dz[c] = static_cast<T>(slot_gate * d * v.df);
            if constexpr (kWriteH) gated_h[c] = static_cast<T>(slot_gate * v.f);
        }
        return sum;
    }
}

}  // namespace

// target_clones takes plain functions, so each dtype's specialisation is spelled out around the inlined loops.
#define SCATTERMOE_ROW_KERNELS(T)                                                                                      \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES void weighted_sum<T>(Compute<T> * sum, const T* const* rows, const Compute<T>* scales,      \
                                                int64_t num_rows, int64_t width) {                                     \
        weighted_sum_loop<T>(sum, rows, scales, num_rows, width);                                                      \
    }                                                                                                                  \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES void round_row<T>(T * y, const Compute<T>* x, int64_t width) {                              \
        for (int64_t c = 0; c < width; ++c)                                                                            \
            y[c] = static_cast<T>(x[c]);                                                                               \
    }                                                                                                                  \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES void scale_row<T>(T * y, const T* x, Compute<T> scale, int64_t width) {                     \
        for (int64_t c = 0; c < width; ++c)                                                                            \
            y[c] = static_cast<T>(scale * static_cast<Compute<T>>(x[c]));                                              \
    }                                                                                                                  \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES Compute<T> dot<T>(const T* a, const T* b, int64_t width) {                                  \
        return dot_loop<T>(a, b, width);                                                                               \
    }                                                                                                                  \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES void activation_forward<T>(const ActivationParams& params, T* h, const T* z,                \
                                                      int64_t hidden) {                                                \
        dispatch_activation(params.activation, [&](auto a) __attribute__((always_inline)) {                            \
            forward_loop<decltype(a)::value, T>(params, h, z, hidden);                                                 \
        });                                                                                                            \
    }                                                                                                                  \
    template <>                                                                                                        \
    SCATTERMOE_SIMD_CLONES Compute<T> activation_backward<T>(                                                          \
        const ActivationParams& params, T* dz, T* gated_h, const T* z, const T* dh, Compute<T> gate, int64_t hidden) { \
        Compute<T> dgate = 0;                                                                                          \
        dispatch_activation(params.activation, [&](auto a) __attribute__((always_inline)) {                            \
            dgate = gated_h ? backward_loop<decltype(a)::value, true, T>(params, dz, gated_h, z, dh, gate, hidden)     \
                            : backward_loop<decltype(a)::value, false, T>(params, dz, gated_h, z, dh, gate, hidden);   \
        });                                                                                                            \
        return dgate;                                                                                                  \
    }

SCATTERMOE_ROW_KERNELS(double)
SCATTERMOE_ROW_KERNELS(float)
SCATTERMOE_ROW_KERNELS(c10::BFloat16)
SCATTERMOE_ROW_KERNELS(c10::Half)

#undef SCATTERMOE_ROW_KERNELS

}  // namespace scattermoe::cpu
