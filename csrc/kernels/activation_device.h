#pragma once

// Activations on short vectors of columns, on the device: the layout of gated rows and the choice of function.

#include <cuda_runtime.h>

#include <cstdint>

#include "activation.h"
#include "vector.h"

namespace scattermoe::kernels {

// kSize gate and kSize up pre-activations of one row (the gate alone where the activation is plain).
template <typename T, int kSize>
struct GluVectors {
    using Vec = Vector<T, kSize>;
    Vec gate;
    Vec up;

    // Pre-activations of the hidden columns [column, column + kSize) of a row of z.
    __device__ __forceinline__ static GluVectors load(const T* row, int64_t column, int64_t width,
                                                      const ActivationParams& params) {
        GluVectors v;
        if (!is_gated(params.activation)) {
            v.gate = Vec::load(row + column);
        } else if (params.layout == GluLayout::kInterleaved) {
            v.from_interleaved(Vec::load(row + 2 * column), Vec::load(row + 2 * column + kSize));
        } else {
            const bool gate_first = params.layout == GluLayout::kGateUp;
            v.gate = Vec::load(row + column + (gate_first ? 0 : width));
            v.up = Vec::load(row + column + (gate_first ? width : 0));
        }
        return v;
    }

    __device__ __forceinline__ void store(T* row, int64_t column, int64_t width, const ActivationParams& params) const {
        if (!is_gated(params.activation)) {
            gate.store(row + column);
        } else if (params.layout == GluLayout::kInterleaved) {
            Vec low, high;
#pragma unroll
            for (int i = 0; i < 2 * kSize; ++i) {
                const T value = i % 2 == 0 ? gate.elements[i / 2] : up.elements[i / 2];
                (i < kSize ? low : high).elements[i % kSize] = value;
            }
            low.store(row + 2 * column);
            high.store(row + 2 * column + kSize);
        } else {
            const bool gate_first = params.layout == GluLayout::kGateUp;
            gate.store(row + column + (gate_first ? 0 : width));
            up.store(row + column + (gate_first ? width : 0));
        }
    }

    __device__ __forceinline__ void from_interleaved(const Vec& low, const Vec& high) {
#pragma unroll
        for (int i = 0; i < 2 * kSize; ++i) {
            const T value = i < kSize ? low.elements[i % kSize] : high.elements[i % kSize];
            (i % 2 == 0 ? gate : up).elements[i / 2] = value;
        }
    }
};

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> activate(const GluVectors<T, kSize>& z, const ActivationParams& params) {
    using Compute = ComputeType<T>;
    const Compute alpha = static_cast<Compute>(params.alpha), limit = static_cast<Compute>(params.limit);
    Vector<T, kSize> hidden;
    dispatch_activation(params.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            if constexpr (is_gated(kActivation)) {
                hidden.set(i, gated_activation<kActivation, Compute>(z.gate.get(i), z.up.get(i), alpha, limit).h);
            } else {
                hidden.set(i, nonlinearity<kActivation, Compute>(z.gate.get(i)).f);
            }
        }
    });
    return hidden;
}

// What one vector of columns adds to the backward of a row.
template <typename T, int kSize>
struct ActivationGradient {
    GluVectors<T, kSize> grad_z;
    Vector<T, kSize> gated_hidden;
    ComputeType<T> dot;  // <grad_hidden, act(z)>
};

template <typename T, int kSize>
__device__ __forceinline__ ActivationGradient<T, kSize> activate_backward(const GluVectors<T, kSize>& z,
                                                                          const ComputeType<T> (&grad_hidden)[kSize],
                                                                          ComputeType<T> gate,
                                                                          const ActivationParams& params) {
    using Compute = ComputeType<T>;
    const Compute alpha = static_cast<Compute>(params.alpha), limit = static_cast<Compute>(params.limit);
    ActivationGradient<T, kSize> result;
    result.dot = 0;
    dispatch_activation(params.activation, [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const Compute dh = grad_hidden[i];
            Compute h;
            if constexpr (is_gated(kActivation)) {
                const auto v = gated_activation<kActivation, Compute>(z.gate.get(i), z.up.get(i), alpha, limit);
                h = v.h;
                result.grad_z.gate.set(i, gate * dh * v.dgate);
                result.grad_z.up.set(i, gate * dh * v.dup);
            } else {
                const auto v = nonlinearity<kActivation, Compute>(z.gate.get(i));
                h = v.f;
                result.grad_z.gate.set(i, gate * dh * v.df);
            }
            result.gated_hidden.set(i, gate * h);
            result.dot += dh * h;
        }
    });
    return result;
}

}  // namespace scattermoe::kernels
