#pragma once

// The activations of an expert MLP as scalar functions of the compute type (float or double), shared by every backend.
// No torch header, usable on host and device; written without branches on data so that host loops vectorise.

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <type_traits>

#if defined(__CUDACC__)
#define SCATTERMOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SCATTERMOE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace scattermoe {

enum class Activation : int {
    // gated: h = f(gate) * up, two pre-activation columns for each hidden one
    kSwiglu,
    kGeglu,
    kGegluTanh,
    kReglu,
    kSwigluClamped,
    // plain: h = f(z)
    kSilu,
    kGelu,
    kGeluTanh,
    kRelu,
    kRelu2,
    kIdentity,
};

// Where the gate and up columns of a gated pre-activation row lie.
enum class GluLayout : int {
    kGateUp,       // [gate | up]: Hugging Face
    kUpGate,       // [up | gate]: ScatterMoE's GLUMLP
    kInterleaved,  // gate, up, gate, up, ...: gpt-oss
};

struct ActivationName {
    std::string_view name;
    Activation activation;
};

inline constexpr std::array<ActivationName, 11> kActivationNames{{
    {"swiglu", Activation::kSwiglu},
    {"geglu", Activation::kGeglu},
    {"geglu_tanh", Activation::kGegluTanh},
    {"reglu", Activation::kReglu},
    {"swiglu_clamped", Activation::kSwigluClamped},
    {"silu", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},
    {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
    {"identity", Activation::kIdentity},
}};

struct GluLayoutName {
    std::string_view name;
    GluLayout layout;
};

inline constexpr std::array<GluLayoutName, 3> kGluLayoutNames{{
    {"gate_up", GluLayout::kGateUp},
    {"up_gate", GluLayout::kUpGate},
    {"interleaved", GluLayout::kInterleaved},
}};

SCATTERMOE_HOST_DEVICE constexpr bool is_gated(Activation activation) {
    return static_cast<int>(activation) <= static_cast<int>(Activation::kSwigluClamped);
}

// Everything that decides what the activation computes; a plain value that kernels take as a parameter.
struct ActivationParams {
    Activation activation = Activation::kSwiglu;
    GluLayout layout = GluLayout::kGateUp;
    double alpha = 1.702;  // slope of swiglu_clamped's sigmoid
    double limit = 7.0;    // clamp of swiglu_clamped's pre-activations
};

namespace activation_math {

SCATTERMOE_HOST_DEVICE float exp(float x) {
#if defined(__CUDA_ARCH__)
    // What is under 2^-126 becomes zero. To keep it, as __expf does, takes predicates around the exponential, and the
    // exponentials of a thread then wait for each other.
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
    return result;
#else
    // Cody-Waite reduction to [-ln2/2, ln2/2] and a polynomial fitted to the relative error, within one ulp: unlike
    // libm's expf it needs no call, so loops over it vectorise. NaN passes through the comparisons.
    x = x > 88.376f ? 88.376f : x;
    x = x < -87.336f ? -87.336f : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.394644656e-03f;
    p = p * r + 8.369151694e-03f;
    p = p * r + 4.166626314e-02f;
    p = p * r + 1.666651599e-01f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = (__builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kRound) + 127) << 23;
    return p * __builtin_bit_cast(float, exponent);
#endif
}

SCATTERMOE_HOST_DEVICE double exp(double x) {
    return ::exp(x);
}

template <typename T>
SCATTERMOE_HOST_DEVICE T reciprocal(T x) {
#if defined(__CUDA_ARCH__)
    // Within two ulp, and a tenth of the instructions of IEEE division.
    if constexpr (std::is_same_v<T, float>) return __fdividef(1.0f, x);
#endif
    return T(1) / x;
}

// sigmoid(x) and 1 - sigmoid(x), each to full precision: subtracting would lose the second where the first is close to
// one. On the GPU the second is 0 where the first is: it is for products of both.
template <typename T>
struct Sigmoid {
    T value;
    T complement;
};

template <typename T>
SCATTERMOE_HOST_DEVICE Sigmoid<T> sigmoid_and_complement(T x) {
    const T e = activation_math::exp(-x);
    const T s = reciprocal(T(1) + e);
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, float>) return {s, fminf(e, 0x1p126f) * s};
#endif
    return {s, x < T(0) ? T(1) - s : e * s};
}

template <typename T>
SCATTERMOE_HOST_DEVICE T sigmoid(T x) {
    return reciprocal(T(1) + activation_math::exp(-x));
}

// f(x) and f'(x) of one nonlinearity.
template <typename T>
struct Value {
    T f;
    T df;
};

template <typename T>
SCATTERMOE_HOST_DEVICE Value<T> silu(T x) {
    const auto [s, c] = sigmoid_and_complement(x);
    return {x * s, s * (T(1) + x * c)};
}

template <typename T>
SCATTERMOE_HOST_DEVICE Value<T> gelu(T x) {
    constexpr T kInvSqrt2 = T(0.70710678118654752440);
    constexpr T kInvSqrt2Pi = T(0.39894228040143267794);
    const T cdf = T(0.5) * (T(1) + T(std::erf(x * kInvSqrt2)));
    return {x * cdf, cdf + x * kInvSqrt2Pi * activation_math::exp(T(-0.5) * x * x)};
}

// 0.5 x (1 + tanh u) written as x sigmoid(2u): no cancellation for negative u.
template <typename T>
SCATTERMOE_HOST_DEVICE Value<T> gelu_tanh(T x) {
    constexpr T kTwoSqrt2OverPi = T(1.59576912160573071176);
    constexpr T kCubic = T(0.044715);
    const auto [s, c] = sigmoid_and_complement(kTwoSqrt2OverPi * x * (T(1) + kCubic * x * x));
    return {x * s, s + x * s * c * kTwoSqrt2OverPi * (T(1) + T(3) * kCubic * x * x)};
}

// NaN passes through relu, as it does through torch's.
template <typename T>
SCATTERMOE_HOST_DEVICE Value<T> relu(T x) {
    return {x <= T(0) ? T(0) : x, x <= T(0) ? T(0) : T(1)};
}

template <typename T>
SCATTERMOE_HOST_DEVICE Value<T> relu2(T x) {
    const T r = x <= T(0) ? T(0) : x;
    return {r * r, T(2) * r};
}

}  // namespace activation_math

template <Activation A, typename T>
SCATTERMOE_HOST_DEVICE activation_math::Value<T> nonlinearity(T x) {
    if constexpr (A == Activation::kSwiglu || A == Activation::kSilu) {
        return activation_math::silu(x);
    } else if constexpr (A == Activation::kGeglu || A == Activation::kGelu) {
        return activation_math::gelu(x);
    } else if constexpr (A == Activation::kGegluTanh || A == Activation::kGeluTanh) {
        return activation_math::gelu_tanh(x);
    } else if constexpr (A == Activation::kReglu || A == Activation::kRelu) {
        return activation_math::relu(x);
    } else if constexpr (A == Activation::kRelu2) {
        return activation_math::relu2(x);
    } else {
        static_assert(A == Activation::kIdentity);
        return {x, T(1)};
    }
}

// h(gate, up) and its two partial derivatives.
template <typename T>
struct GatedValue {
    T h;
    T dgate;
    T dup;
};

template <Activation A, typename T>
SCATTERMOE_HOST_DEVICE GatedValue<T> gated_activation(T gate, T up, T alpha, T limit) {
    static_assert(is_gated(A));
    if constexpr (A == Activation::kSwigluClamped) {
        // gpt-oss: gate' = min(gate, limit), up' = clamp(up, -limit, limit), h = (up' + 1) gate' sigmoid(alpha gate').
        const T g = gate > limit ? limit : gate;
        const T u = up > limit ? limit : (up < -limit ? -limit : up);
        const auto [s, c] = activation_math::sigmoid_and_complement(alpha * g);
        const T dg = gate > limit ? T(0) : s * (T(1) + alpha * g * c);
        const T du = up > limit || up < -limit ? T(0) : T(1);
        return {(u + T(1)) * g * s, (u + T(1)) * dg, du * g * s};
    } else {
        const activation_math::Value<T> v = nonlinearity<A>(gate);
        return {v.f * up, v.df * up, v.f};
    }
}

// Calls f with the activation as a compile-time constant: f(std::integral_constant<Activation, ...>{}).
template <typename F>
SCATTERMOE_HOST_DEVICE void dispatch_activation(Activation activation, F&& f) {
    switch (activation) {
#define SCATTERMOE_CASE(NAME)                                      \
    case Activation::NAME:                                         \
        f(std::integral_constant<Activation, Activation::NAME>{}); \
        return
        SCATTERMOE_CASE(kSwiglu);
        SCATTERMOE_CASE(kGeglu);
        SCATTERMOE_CASE(kGegluTanh);
        SCATTERMOE_CASE(kReglu);
        SCATTERMOE_CASE(kSwigluClamped);
        SCATTERMOE_CASE(kSilu);
        SCATTERMOE_CASE(kGelu);
        SCATTERMOE_CASE(kGeluTanh);
        SCATTERMOE_CASE(kRelu);
        SCATTERMOE_CASE(kRelu2);
        SCATTERMOE_CASE(kIdentity);
#undef SCATTERMOE_CASE
    }
}

}  // namespace scattermoe
