// NEON, which every 64-bit ARM has: a quarter of a quad per register. Products of bytes are 16 bits wide and are added in
// pairs into 32 bits, two sums per lane, which are added at the end.
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "../kernels.h"
#include "../matmul.h"

namespace mikv {
namespace {

constexpr int kLanes = 4;
using Floats = float32x4_t;
using Bytes = uint8x16_t;

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats x) { vst1q_f32(p, x); }
inline Floats broadcast(float x) { return vdupq_n_f32(x); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline float reduce_add(Floats x) { return vaddvq_f32(x); }
inline float reduce_max(Floats x) { return vmaxvq_f32(x); }
inline Floats from_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats round_to_int(Floats x) { return vrndnq_f32(x); }
inline Floats scale_by_power(Floats x, Floats exponent) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(exponent), vdupq_n_s32(127));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}
inline Floats first_lanes(int count, Floats x, Floats other) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(count)), x, other);
}

inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes low_nibbles(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes x) { return vshrq_n_u8(x, 4); }
inline Bytes spare_bits(Bytes a, Bytes b, Bytes c) {
  const Bytes spare = vdupq_n_u8(0x88);
  const Bytes ab = vorrq_u8(vshrq_n_u8(vandq_u8(a, spare), 3), vshrq_n_u8(vandq_u8(b, spare), 2));
  return vorrq_u8(ab, vshrq_n_u8(vandq_u8(c, spare), 1));
}
inline Bytes table(const uint8_t* entries) { return vld1q_u8(entries); }
inline Bytes lookup(Bytes entries, Bytes index) { return vqtbl1q_u8(entries, index); }

// Bytes are multiplied either signed, as levels of keys (at most 40) and queries, or unsigned, as levels of values and
// weights.
struct Dot {
  int32x4_t low, high;  // lanes 0, 0, 1, 1 and 2, 2, 3, 3
};
inline Dot zero_dot() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Floats dot_total(const Dot& acc) { return vcvtq_f32_s32(vpaddq_s32(acc.low, acc.high)); }
template <int kRun>
inline void dot_keys(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  for (int i = 0; i < 4; ++i) {
    const int8x16_t quad = vreinterpretq_s8_u8(quads[i]), word = vreinterpretq_s8_s32(vdupq_n_s32(words[i]));
    acc.low = vpadalq_s16(acc.low, vmull_s8(vget_low_s8(quad), vget_low_s8(word)));
    acc.high = vpadalq_s16(acc.high, vmull_high_s8(quad, word));
  }
}
template <int kRun>
inline void dot_values(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t word = vreinterpretq_u8_s32(vdupq_n_s32(words[i]));
    const uint16x8_t low = vmull_u8(vget_low_u8(quads[i]), vget_low_u8(word)), high = vmull_high_u8(quads[i], word);
    acc.low = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(acc.low), low));
    acc.high = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(acc.high), high));
  }
}

// 16-bit words against 8-bit codes, a lane's four products in one register
constexpr int kWideMax = 16383;
constexpr int kWideValueBias = 0;
struct Wide {
  int32x4_t lane[4];
};
inline Wide zero_wide() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
inline void split_keys(const int32_t* four, int32_t* words) {
  const int16_t halves[4] = {(int16_t)four[0], (int16_t)four[1], (int16_t)four[2], (int16_t)four[3]};
  memcpy(words, halves, sizeof halves);
}
inline void split_values(const int32_t* four, int32_t* words) { split_keys(four, words); }
inline void wide_keys(Wide& acc, Bytes codes, const int32_t* words) {
  int16_t halves[4];
  memcpy(halves, words, sizeof halves);
  const int16x4_t word = vld1_s16(halves);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
  acc.lane[0] = vmlal_s16(acc.lane[0], vget_low_s16(low), word);
  acc.lane[1] = vmlal_s16(acc.lane[1], vget_high_s16(low), word);
  acc.lane[2] = vmlal_s16(acc.lane[2], vget_low_s16(high), word);
  acc.lane[3] = vmlal_s16(acc.lane[3], vget_high_s16(high), word);
}
inline Bytes wide_value_codes(Bytes codes) { return codes; }
inline void wide_values(Wide& acc, Bytes codes, const int32_t* words) { wide_keys(acc, codes, words); }
inline Floats wide_total(const Wide& acc) {
  return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(acc.lane[0], acc.lane[1]), vpaddq_s32(acc.lane[2], acc.lane[3])));
}

constexpr bool kSignedValues = false;
inline void store_weights(uint8_t* p, Floats x) {
  const uint32x4_t ints = vcvtnq_u32_f32(x);
  for (int i = 0; i < 4; ++i) p[i] = (uint8_t)ints[i];
}
inline void store_ints(int32_t* p, Floats x) { vst1q_s32(p, vcvtnq_s32_f32(x)); }
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }


// Bytes of two rows in each 16-bit lane: their sums, see lut.inc.
inline Bytes zero_bytes() { return vdupq_n_u8(0); }
inline Bytes add_words(Bytes a, Bytes b) {
  return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
inline Bytes add_odd_bytes(Bytes sum, Bytes x) {
  return vreinterpretq_u8_u16(vsraq_n_u16(vreinterpretq_u16_u8(sum), vreinterpretq_u16_u8(x), 8));
}
inline Bytes even_bytes(Bytes all, Bytes odd) {
  const uint16x8_t high = vshlq_n_u16(vreinterpretq_u16_u8(odd), 8);
  return vreinterpretq_u8_u16(vsubq_u16(vreinterpretq_u16_u8(all), high));
}
inline void words_to_floats(Bytes words, int less, Floats* out) {
  const int16x8_t numbers = vsubq_s16(vreinterpretq_s16_u8(words), vdupq_n_s16((int16_t)less));
  out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(numbers)));
  out[1] = vcvtq_f32_s32(vmovl_high_s16(numbers));
}
constexpr int kMostLutRows = 16;
constexpr int kLutRowsAtOnce = 2;

// Signs as levels, and levels times signed bytes, see bytes.inc. Levels are multiplied as signed.
constexpr int kMostLevel = 127;
constexpr int kByteRowsAtOnce = 2, kByteVectors = 4;
inline void store_bytes(uint8_t* p, Bytes x) { vst1q_u8(p, x); }
inline Bytes four_times(Floats x) { return vreinterpretq_u8_u32(vmulq_n_u32(vcvtnq_u32_f32(x), 0x01010101)); }
inline Bytes bits_of_nibble(int nibble) { return vreinterpretq_u8_u32(vdupq_n_u32(nibble ? 0x80402010 : 0x08040201)); }
// byte 2 i + kHalf of 8 at all four bytes of lane i
template <int kHalf>
inline Bytes spread_rows(const uint8_t* p) {
  const uint8_t places[16] = {0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6};
  const uint8x8_t pairs = vld1_u8(p);
  return vqtbl1q_u8(vcombine_u8(pairs, pairs), vaddq_u8(vld1q_u8(places), vdupq_n_u8(kHalf)));
}
// sum + level, where a bit is set
inline Bytes add_where(Bytes sum, Bytes signs, Bytes bits, Bytes level) {
  return vaddq_u8(sum, vandq_u8(vtstq_u8(signs, bits), level));
}
using LevelSum = Dot;
inline LevelSum zero_level_sum() { return zero_dot(); }
inline Bytes broadcast_four(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}
inline void add_products(LevelSum& acc, Bytes levels, Bytes numbers) {
  const int8x16_t level = vreinterpretq_s8_u8(levels), number = vreinterpretq_s8_u8(numbers);
  acc.low = vpadalq_s16(acc.low, vmull_s8(vget_low_s8(level), vget_low_s8(number)));
  acc.high = vpadalq_s16(acc.high, vmull_high_s8(level, number));
}
inline Floats level_total(const LevelSum& acc) { return dot_total(acc); }

#include "half.inc"
#include "transform.inc"
#include "attend.inc"
#include "pack.inc"
#include "score.inc"
#include "inputs.inc"
#include "lut.inc"
#include "bytes.inc"

}  // namespace

extern const Kernels kernels_neon = MIKV_KERNELS("neon");

}  // namespace mikv
