// One row of the loss: the arithmetic of kernels/logits_rows.py (formulas there), the same on host and device.
// Kernels and the C ABI: logits_rows.cu.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define HD __host__ __device__ __forceinline__

constexpr float kFloor = -1e30f;       // finite: -inf - -inf would be NaN in threads that saw nothing
constexpr float kTiny = -1000.f;       // e^kTiny = 0, and 0 * kTiny = 0 where 0 * -inf is NaN
constexpr float kMaxLogRatio = 80.f;

struct RowArgs {
  void* logits;  // [rows, vocab], row stride `stride`; overwritten by dL/dz where write_grad
  const float* bias;
  const int64_t* target;
  const float* policy_weight;  // each of these [rows], or null
  const float* advantages;
  const float* old_logprobs;
  const float* ref_logprobs;
  const float* sft_weight;
  float* logprobs;  // [rows]
  float* parts;     // [5, rows], row stride `parts_stride`: policy, sft, kl, entropy, clipped
  int64_t rows, vocab, stride, parts_stride;
  float epsilon_low, epsilon_high, dual_clip, beta, entropy_coef, softcap, temperature;  // 0: no dual clip, no cap
  int32_t write_grad;
};

// What a row's gradient needs once its statistics are known.
struct RowState {
  float top, log_sum, entropy, grad_logprob, grad_entropy;
};

struct Stats {
  float top = kFloor, sum = 0.f, moment = 0.f;  // max l, sum e^d, sum e^d d with d = l - top
};

HD float exp_(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return expf(x);
#endif
}

HD float to_float(float x) { return x; }
HD float to_float(__half x) { return __half2float(x); }
HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
HD void from_float(float x, float& out) { out = x; }
HD void from_float(float x, __half& out) { out = __float2half_rn(x); }
HD void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

HD Stats merge(Stats a, Stats b) {
  Stats out;
  out.top = fmaxf(a.top, b.top);
  float shift_a = a.top - out.top, shift_b = b.top - out.top;
  float keep_a = exp_(shift_a), keep_b = exp_(shift_b);
  out.sum = keep_a * a.sum + keep_b * b.sum;
  out.moment = keep_a * (a.moment + a.sum * shift_a) + keep_b * (b.moment + b.sum * shift_b);
  return out;
}

// VEC neighbouring elements: one 16-byte access, or a single one where rows are not aligned.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T x[VEC];
};

template <bool PLAIN>
HD float logit(float z, int64_t column, const RowArgs& a, float scale, float* squashed) {
  if (!PLAIN) {
    if (a.bias) z += a.bias[column];
    if (a.softcap > 0.f) {
      *squashed = tanhf(z / a.softcap);
      z = a.softcap * *squashed;
    }
  }
  return z * scale;
}

template <typename T, int VEC, bool PLAIN>
HD void accumulate(Stats& s, const T* slice, int64_t begin, int count, int thread, int threads, const RowArgs& a) {
  const float scale = 1.f / a.temperature;
  for (int i = thread; i < count / VEC; i += threads) {
    Pack<T, VEC> pack = reinterpret_cast<const Pack<T, VEC>*>(slice)[i];
    float l[VEC], unused;
    float top = s.top;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      l[j] = logit<PLAIN>(to_float(pack.x[j]), begin + int64_t(i) * VEC + j, a, scale, &unused);
      top = fmaxf(top, l[j]);
    }
    float shift = s.top - top, keep = exp_(shift);
    s.moment = keep * (s.moment + s.sum * shift);
    s.sum *= keep;
    s.top = top;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      float d = l[j] - top, e = exp_(d);
      s.sum += e;
      s.moment += e * fmaxf(d, kTiny);
    }
  }
}

template <typename T, int VEC, bool PLAIN>
HD void write_gradient(
    const T* slice, T* out, int64_t begin, int count, int thread, int threads, int64_t target, RowState row,
    const RowArgs& a) {
  const float scale = 1.f / a.temperature;
  for (int i = thread; i < count / VEC; i += threads) {
    Pack<T, VEC> pack = reinterpret_cast<const Pack<T, VEC>*>(slice)[i];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      int64_t column = begin + int64_t(i) * VEC + j;
      float squashed = 0.f;
      float logp = logit<PLAIN>(to_float(pack.x[j]), column, a, scale, &squashed) - row.top - row.log_sum;
      float grad = -exp_(logp) * (row.grad_logprob + row.grad_entropy * (fmaxf(logp, kTiny) + row.entropy));
      if (column == target) grad += row.grad_logprob;
      grad *= scale;
      if (!PLAIN && a.softcap > 0.f) grad *= 1.f - squashed * squashed;
      from_float(grad, pack.x[j]);
    }
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(pack) == 16) {  // streaming: the GEMMs that follow read the whole chunk from HBM anyway
      __stcs(reinterpret_cast<uint4*>(out) + i, reinterpret_cast<const uint4&>(pack));
      continue;
    }
#endif
    reinterpret_cast<Pack<T, VEC>*>(out)[i] = pack;
  }
}

// Log-prob, loss terms and the two coefficients of a row; stores the row's outputs where `store`.
HD RowState finish_row(Stats s, float target_logit, int64_t r, bool store, const RowArgs& a) {
  RowState row;
  row.top = s.top;
  row.log_sum = logf(s.sum);
  row.entropy = row.log_sum - s.moment / s.sum;
  const float logprob = target_logit - row.top - row.log_sum;
  const float sft = a.sft_weight ? a.sft_weight[r] : 0.f;
  const float weight = a.policy_weight ? a.policy_weight[r] : 0.f;
  float policy = 0.f, kl = 0.f, clipped = 0.f;
  row.grad_logprob = -sft;
  row.grad_entropy = 0.f;
  if (weight != 0.f) {  // an SFT row may hold NaN in the values below
    const float advantage = a.advantages[r];
    float ratio = 1.f;
    if (a.old_logprobs) {
      float log_ratio = logprob - a.old_logprobs[r];
      ratio = exp_(log_ratio > kMaxLogRatio ? kMaxLogRatio : log_ratio);  // NaN stays NaN
    }
    const float low = 1.f - a.epsilon_low, high = 1.f + a.epsilon_high;
    const float raw = ratio * advantage;
    const float bounded = (ratio > high ? high : ratio < low ? low : ratio) * advantage;
    float objective = bounded < raw ? bounded : raw;
    bool cut = (advantage > 0.f && ratio > high) || (advantage < 0.f && ratio < low);
    if (a.dual_clip > 0.f && advantage < 0.f && objective < a.dual_clip * advantage) {
      objective = a.dual_clip * advantage;
      cut = true;
    }
    float slope = cut ? 0.f : -raw;
    if (a.beta != 0.f) {
      const float gap = a.ref_logprobs[r] - logprob, growth = exp_(gap);
      kl = weight * (growth - gap - 1.f);
      slope += a.beta * (1.f - growth);
    }
    policy = -weight * objective;
    clipped = cut ? 1.f : 0.f;
    row.grad_logprob += weight * slope;
    row.grad_entropy = -a.entropy_coef * weight;
  }
  if (store) {
    const float parts[5] = {policy, -sft * logprob, kl, weight * row.entropy, clipped};
    a.logprobs[r] = logprob;
    for (int i = 0; i < 5; ++i) a.parts[i * a.parts_stride + r] = parts[i];
  }
  return row;
}

HD bool is_dead(int64_t r, const RowArgs& a) {
  return (!a.policy_weight || a.policy_weight[r] == 0.f) && (!a.sft_weight || a.sft_weight[r] == 0.f);
}

HD void store_dead(int64_t r, const RowArgs& a) {
  a.logprobs[r] = 0.f;
  for (int i = 0; i < 5; ++i) a.parts[i * a.parts_stride + r] = 0.f;
}

// The target's logit, read before the row is overwritten; NaN for a target outside [0, vocab).
template <typename T, bool PLAIN>
HD float target_logit(const T* row, int64_t target, const RowArgs& a) {
  float unused;
  if (target < 0 || target >= a.vocab) return nanf("");
  return logit<PLAIN>(to_float(row[target]), target, a, 1.f / a.temperature, &unused);
}

template <typename T, int VEC>
HD void zero_slice(T* out, int count, int thread, int threads) {
  Pack<T, VEC> zero;
  for (int j = 0; j < VEC; ++j) from_float(0.f, zero.x[j]);
  for (int i = thread; i < count / VEC; i += threads) reinterpret_cast<Pack<T, VEC>*>(out)[i] = zero;
}
