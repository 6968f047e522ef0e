// fxgrow.kernels, CPU backend: one tensor (or shard) of a growth plan, source read once, destination written once.
//
// A destination is rows (up to three outer dims) of columns. Columns are cut into segments, runs of virtual columns with
// one multiplicity; a strip of a segment is made in the first-level cache and streamed to every place it goes. Values
// equal kernels/reference.py to the bit: same integers, same order of float operations, no fused multiply-adds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <new>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if __has_include(<pthread.h>)
#include <pthread.h>
#define THREADS
#endif

namespace {

using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum Fill : u8 { ZERO = 0, RANDOM = 1, MEAN = 2, CONSTANT = 3, OLD = 255 };
enum Purpose : u32 { SPLIT = 0, PAIR = 1, INDEPENDENT = 2, RANDOM_FILL = 3 };
enum Type : int { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };

// ---- what Python hands over; kernels/native.py mirrors these structures field by field ----

struct Outer {
  i64 groups;            // virtual units with at least one local entry, in source order
  const i64* unit;       // (groups,) virtual coordinate
  const i64* start;      // (groups + 1,) into entry and leaf
  const i64* entry;      // local destination coordinate
  const i64* leaf;       // position within the group's tree
  const u8* code;        // (groups,) fill code
  const i64* shape;      // (groups,) group size if the group is split, 0 if plain
  const double* lean;    // leans of the group's cuts, preorder; at lean + lean_at[g]
  const i64* lean_at;    // (groups,)
  const i64* paired;     // (groups,) group size if its newborn entries get (+z, -z), else 0; null: none
  const double* scale;   // per local entry, or null
  const u8* copy;        // per local entry: a copy and not the first, or null
  i64 source_stride, target_stride;  // in elements
  i64 virtual_linear, split_linear, target_linear;  // strides of the three linear indices
  i64 offset;            // global coordinate of local entry 0
};

struct Segment {
  i64 first, count;      // virtual columns [first, first + count), or positions in units
  const i64* units;      // (count,) virtual columns, or null
  i64 leaves;            // destinations per column (group size when split)
  i64 split;             // 1: cut by a tree; 0: plain copies
  i64 paired;            // 1: newborn (+z, -z) pairs
  i64 code;
  const i64* base;       // (leaves,) local destination column of the first column, -1: not in this shard
  i64 step;              // destination columns per virtual column
  const i64* scatter;    // (leaves, count) destination columns, -1: not here; or null
  const double* lean;    // (leaves - 1,) leans, or (leaves - 1, count) if lean_step is 1
  i64 lean_step;
  const double* scale;   // (count,) or null
};

struct Cuts {            // the tree of groups of one size, preorder
  i64 leaves;
  const i64* node;       // (leaves - 1,)
  const i64* lo;
  const i64* mid;
  const double* spread;  // times amplitude: from a raw draw to noise
};

struct Task {
  const void* source;
  void* target;
  i64 source_type, target_type, item_bytes;  // item_bytes > 0: bits are copied, types do not matter
  Outer outer[3];
  i64 rows_outer;        // number of outer dims in use (leading entries of outer)
  i64 segments;
  const Segment* segment;
  i64 column_source_stride;
  i64 columns;           // local
  i64 column_offset;     // global coordinate of local column 0
  const u8* column_copy;
  const Cuts* cut;
  i64 split_outer;       // outer dim that is split, or -1
  double scale, constant, random_amplitude, pair_amplitude, independent_amplitude;
  i64 tree_noise, pair_noise, independent;
  i64 distribution;
  u32 noise_key[2], random_key[2];
  const void* means[16]; // per set of mean dims (bit d of the set: outer d, bit 3: columns), in the compute type
  i64 mean_stride[16][4];
  i64 stream, threads;
  u64 constant_bits[2];
};

constexpr int STRIP = 512;  // columns of a strip: a few buffers of it fit the first-level cache
constexpr int WIDE = 16 * STRIP;

// ---- Philox 4x32-10 ----

constexpr u32 M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

inline void philox_quad(u32* out, u64 quad, u32 node, u32 purpose, u32 k0, u32 k1) {
  u32 c0 = u32(quad), c1 = u32(quad >> 32), c2 = node, c3 = purpose;
  for (int r = 0; r < 10; ++r) {
    u64 p0 = u64(c0) * M0, p1 = u64(c2) * M1;
    c0 = u32(p1 >> 32) ^ c1 ^ k0;
    c1 = u32(p1);
    c2 = u32(p0 >> 32) ^ c3 ^ k1;
    c3 = u32(p0);
    k0 += W0;
    k1 += W1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// ---- vectors: as wide as the processor's registers ----

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
#define VECTOR(type, bytes) type __attribute__((vector_size(bytes), may_alias))
typedef VECTOR(float, WIDTH) VF;
typedef VECTOR(double, WIDTH) VD;
typedef VECTOR(u32, WIDTH) VU;
typedef VECTOR(int32_t, WIDTH) VI;
typedef VECTOR(u64, WIDTH) VL;
typedef VECTOR(u16, WIDTH / 2) VH;        // one for each lane of VU
typedef VECTOR(float, WIDTH / 2) VFHalf;  // one for each lane of VD

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
inline void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

// Past the caches, to a place that is aligned to the vector.
template <class V>
inline void stream(void* to, const V& v) {
#if defined(__AVX512F__)
  if (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), load<__m512i>(&v));
#endif
#if defined(__AVX2__)
  if (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), load<__m256i>(&v));
  if (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), load<__m128i>(&v));
#endif
  store(to, v);
}

#if defined(__AVX512F__)
inline __m512i byte_draws(__m512i words) {
#if defined(__AVX512VNNI__)
  const __m512i sum = _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), words, _mm512_set1_epi8(1));
#else
  const __m512i pairs = _mm512_maddubs_epi16(words, _mm512_set1_epi8(1));
  const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)), _mm512_set1_epi32(-510));
#endif
  return _mm512_castps_si512(_mm512_cvtepi32_ps(sum));
}
#elif defined(__AVX2__)
inline __m256i byte_draws(__m256i words) {
  const __m256i pairs = _mm256_maddubs_epi16(words, _mm256_set1_epi8(1));
  const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), _mm256_set1_epi32(-510));
  return _mm256_castps_si256(_mm256_cvtepi32_ps(sum));
}
#endif

inline VF as_float(VI v) { return __builtin_convertvector(v, VF); }

inline VF root(VF v) {
#if defined(__AVX512F__)
  return VF(_mm512_sqrt_ps(__m512(v)));
#elif defined(__AVX2__)
  return VF(_mm256_sqrt_ps(__m256(v)));
#else
  for (int i = 0; i < WIDTH / 4; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

inline VF log_unit(VF y) {  // Cephes logf on (0, 1]
  const VU bits = VU(y);
  VF exponent = as_float(VI(bits >> 23) - 126);
  VF m = VF((bits & 0x007FFFFFu) | 0x3F000000u);
  const VI low = m < 0.70710677f;
  exponent = low ? exponent - 1.0f : exponent;
  m = (low ? m + m : m) - 1.0f;
  const VF z = m * m;
  VF p = m * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p = p + exponent * -2.12194440e-4f;
  p = p - z * 0.5f;
  return (m + p) + exponent * 0.693359375f;
}

inline VF draw(i64 distribution, VU word) {
  if (distribution == 0) {
    const VU pairs = (word & 0x00FF00FFu) + ((word >> 8) & 0x00FF00FFu);
    return as_float(VI((pairs & 0xFFFFu) + (pairs >> 16)) - 510);
  }
  if (distribution == 2) return 1.0f - as_float(VI(word >> 31)) * 2.0f;
  const VF x = as_float(VI((word >> 8) * 2u) + (1 - (1 << 24))) * 0x1p-24f;
  const VF w = -log_unit((1.0f - x) * (1.0f + x));
  const VF c = w - 2.5f, t = root(w) - 3.0f;
  VF p = c * 2.81022636e-08f + 3.43273939e-07f;
  p = p * c + -3.5233877e-06f;
  p = p * c + -4.39150654e-06f;
  p = p * c + 0.00021858087f;
  p = p * c + -0.00125372503f;
  p = p * c + -0.00417768164f;
  p = p * c + 0.246640727f;
  p = p * c + 1.50140941f;
  VF q = t * -0.000200214257f + 0.000100950558f;
  q = q * t + 0.00134934322f;
  q = q * t + -0.00367342844f;
  q = q * t + 0.00573950773f;
  q = q * t + -0.0076224613f;
  q = q * t + 0.00943887047f;
  q = q * t + 1.00167406f;
  q = q * t + 2.83297682f;
  return (w < 5.0f ? p : q) * x;
}

// Quads of four 32-bit words in 64-bit lanes: a 32-bit product needs no masking, and what is in the upper halves is
// never read.
#if defined(__AVX512F__)
using Words = __m512i;
constexpr int FLIGHT = 4;  // vectors in flight: hides the latency of the multiplier
inline Words all(u64 w) { return _mm512_set1_epi64(i64(w)); }
inline Words times(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Words exclusive(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words from(u64 quad) { return _mm512_add_epi64(all(quad), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Words together(Words low, Words high) { return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32)); }
inline void in_order(Words even, Words odd, Words& x, Words& y) {
  x = _mm512_permutex2var_epi64(even, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), odd);
  y = _mm512_permutex2var_epi64(even, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), odd);
}
inline Words low_pairs(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words high_pairs(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(__AVX2__)
using Words = __m256i;
constexpr int FLIGHT = 4;
inline Words all(u64 w) { return _mm256_set1_epi64x(i64(w)); }
inline Words times(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Words exclusive(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words from(u64 quad) { return _mm256_add_epi64(all(quad), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Words together(Words low, Words high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
inline void in_order(Words even, Words odd, Words& x, Words& y) {
  x = _mm256_permute2x128_si256(even, odd, 0x20);
  y = _mm256_permute2x128_si256(even, odd, 0x31);
}
inline Words low_pairs(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words high_pairs(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
#endif

// The words of values [linear, linear + count), or, with BYTES, the float draws `sum of bytes - 510` made of them.
// out has room for count + SLACK. Returns where the first one lies.
constexpr int SLACK = 192;
#define EACH(i, count) _Pragma("GCC unroll 10") for (int i = 0; i < count; ++i)  // in registers
template <bool BYTES>
const u32* generate(u32* out, u64 linear, int count, u32 node, u32 purpose, const u32* key) {
  u64 quad = linear >> 2;
  const int lane = int(linear & 3), quads = (lane + count + 3) >> 2;
  int i = 0;
#if defined(__AVX2__)
  constexpr int STEP = WIDTH / 8 * FLIGHT;
  if (quad >> 32 == (quad + u64(quads) + STEP) >> 32) {
    u64 k[20];
    for (int r = 0; r < 10; ++r) k[2 * r] = key[0] + u32(r) * W0, k[2 * r + 1] = key[1] + u32(r) * W1;
    // The second word of the counter, the node and the purpose are the same for all: so is half of the first two rounds.
    const u64 p = u64(node) * M1, q = u64(u32(p >> 32) ^ u32(quad >> 32) ^ u32(k[0])) * M0;
    const Words m0 = all(M0), m1 = all(M1), low_p = all(p), low_q = all(q);
    const Words key_1 = all(purpose ^ k[1]), key_3 = all((q >> 32) ^ k[3]);
    for (; i < quads; i += STEP) {
      Words c0[FLIGHT], c1[FLIGHT], c2[FLIGHT], c3[FLIGHT];
      EACH(v, FLIGHT) {
        const Words p0 = times(from(quad + i + WIDTH / 8 * v), m0);
        const Words p1 = times(exclusive(high(p0), key_1), m1);
        c0[v] = exclusive(high(p1), low_p, all(k[2]));
        c1[v] = p1;
        c2[v] = exclusive(p0, key_3);
        c3[v] = low_q;
      }
      EACH(r, 8) {
        EACH(v, FLIGHT) {
          const Words p0 = times(c0[v], m0), p1 = times(c2[v], m1);
          c0[v] = exclusive(high(p1), c1[v], all(k[2 * r + 4]));
          c2[v] = exclusive(high(p0), c3[v], all(k[2 * r + 5]));
          c1[v] = p1;
          c3[v] = p0;
        }
      }
      EACH(v, FLIGHT) {
        const Words a = together(c0[v], c1[v]), b = together(c2[v], c3[v]);
        Words x, y;
        in_order(low_pairs(a, b), high_pairs(a, b), x, y);
        if (BYTES) x = byte_draws(x), y = byte_draws(y);
        u32* to = out + 4 * (i + WIDTH / 8 * v);
        store(to, x);
        store(to + WIDTH / 4, y);
      }
    }
  }
#endif
  const int rest = 4 * i;
  for (; i < quads; ++i) philox_quad(out + 4 * i, quad + i, node, purpose, key[0], key[1]);
  if (BYTES)
    for (int w = rest; w < 4 * quads; w += WIDTH / 4) store(out + w, draw(0, load<VU>(out + w)));
  return out + lane;
}

// The float draws of values [linear, linear + count); what follows them, to the end of the last vector, can be read.
const float* draws(u32* out, i64 distribution, u64 linear, int count, u32 node, u32 purpose, const u32* key) {
  if (distribution == 0) return reinterpret_cast<const float*>(generate<true>(out, linear, count, node, purpose, key));
  u32* w = const_cast<u32*>(generate<false>(out, linear, count, node, purpose, key));
  if (distribution == 1)
    for (int i = 0; i < count; i += WIDTH / 4) store(w + i, draw(1, load<VU>(w + i)));
  else
    for (int i = 0; i < count; i += WIDTH / 4) store(w + i, draw(2, load<VU>(w + i)));
  return reinterpret_cast<const float*>(w);
}

float draw_one(i64 distribution, u64 linear, u32 node, u32 purpose, const u32* key) {
  u32 quad[4];
  philox_quad(quad, linear >> 2, node, purpose, key[0], key[1]);
  return draw(distribution, VU{} + quad[linear & 3])[0];
}

// ---- element types: a vector of values in the compute type, rounded to the type, and their bits ----

template <class Compute, class Bits, class Vector>
struct Wide {  // computed in itself
  using C = Compute;
  using B = Bits;
  using V = Vector;
  static constexpr int LANES = WIDTH / int(sizeof(C));
  static inline V load(const B* from) { return ::load<V>(from); }
  static inline void store(B* to, V v) { ::store(to, v); }
  static inline void stream(B* to, V v) { ::stream(to, v); }
  static inline V round(V v) { return v; }
  static inline V round_finite(V v) { return v; }
};
struct AsF32 : Wide<float, u32, VF> {
  static inline V noise(const float* raw) { return ::load<VF>(raw); }
  static inline V sign(V v) { return V(VU(v) & 0x80000000u); }
  static inline V flip(V v, V bits) { return V(VU(v) ^ VU(bits)); }
  template <class Mask>
  static inline V where(Mask mask, V v) { return V(VU(mask) & VU(v)); }
};
struct AsF64 : Wide<double, u64, VD> {
  static inline V noise(const float* raw) { return __builtin_convertvector(::load<VFHalf>(raw), VD); }
  static inline V sign(V v) { return V(VL(v) & 0x8000000000000000ull); }
  static inline V flip(V v, V bits) { return V(VL(v) ^ VL(bits)); }
  template <class Mask>
  static inline V where(Mask mask, V v) { return V(VL(mask) & VL(v)); }
};

inline VH low_halves(VU v) {  // of values below 2^16
#if defined(__AVX2__) && !defined(__AVX512F__)
  return VH(_mm_packus_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1)));
#else
  return __builtin_convertvector(v, VH);
#endif
}

struct AsBF16 : AsF32 {
  using B = u16;
  static inline V round(V v) { return v == v ? round_finite(v) : V(VU{} + 0x7FC00000u); }
  static inline V round_finite(V v) {
    const VU u = VU(v);
    return V((u + (((u >> 16) & 1u) + 0x7FFFu)) & 0xFFFF0000u);
  }
  static inline VH half(V rounded) { return low_halves(VU(rounded) >> 16); }
  static inline void store(B* to, V rounded) { ::store(to, half(rounded)); }
  static inline void stream(B* to, V rounded) { ::stream(to, half(rounded)); }
  static inline V load(const B* from) { return V(__builtin_convertvector(::load<VH>(from), VU) << 16); }
};

// The conversions of the processor are those of IEEE 754 and torch's. NaNs become the one that torch makes of them.
struct AsF16 : AsF32 {
  using B = u16;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#if defined(__AVX512F__)
  static inline VH narrow(V v) { return VH(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
  static inline V widen(VH h) { return V(_mm512_cvtph_ps(__m256i(h))); }
#else
  static inline VH narrow(V v) { return VH(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }
  static inline V widen(VH h) { return V(_mm256_cvtph_ps(__m128i(h))); }
#endif
  static inline V round(V v) { return v == v ? widen(narrow(v)) : V((VU(v) & 0x80000000u) | 0x7FC00000u); }
  static inline V round_finite(V v) { return widen(narrow(v)); }
  static inline void store(B* to, V rounded) { ::store(to, narrow(rounded)); }
  static inline void stream(B* to, V rounded) { ::stream(to, narrow(rounded)); }
  static inline V load(const B* from) { return widen(::load<VH>(from)); }
#else
  static inline V round(V v) {
    const VU u = VU(v), sign = u & 0x80000000u, a = u & 0x7FFFFFFFu;
    const VU r = (a + 0xFFFu + ((a >> 13) & 1u)) & 0xFFFFE000u;
    const VF small = (VF(a) + 0.5f) - 0.5f;  // multiples of 2^-24
    VU m = a < 0x38800000u ? VU(small) : r;
    m = m >= 0x47800000u ? VU{} + 0x7F800000u : m;
    m = a > 0x7F800000u ? VU{} + 0x7FC00000u : m;
    return V(m | sign);
  }
  static inline V round_finite(V v) {  // of v >= 0 below infinity
    const VU a = VU(v);
    const VU r = (a + 0xFFFu + ((a >> 13) & 1u)) & 0xFFFFE000u;
    return a < 0x38800000u ? (v + 0.5f) - 0.5f : V(r);
  }
  static inline void store(B* to, V rounded) {
    const VU u = VU(rounded), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
    const VU small = VU(VF(a) + 0.5f) - 0x3F000000u;
    VU m = a < 0x38800000u ? small : (a >> 13) - (112u << 10);
    m = a >= 0x7F800000u ? (a > 0x7F800000u ? VU{} + 0x7E00u : VU{} + 0x7C00u) : m;
    ::store(to, low_halves(m | sign));
  }
  static inline void stream(B* to, V rounded) { store(to, rounded); }
  static inline V load(const B* from) {
    const VU h = __builtin_convertvector(::load<VH>(from), VU), a = h & 0x7FFFu, sign = (h & 0x8000u) << 16;
    const VU normal = (a << 13) + (112u << 23);
    const VF small = VF((a << 13) + (113u << 23)) - VF(VU{} + (113u << 23));
    VU m = a < 0x0400u ? VU(small) : normal;
    m = a >= 0x7C00u ? normal + (112u << 23) : m;
    return V(m | sign);
  }
#endif
};

// Values that lie apart, side by side.
template <class B>
void gather(B* to, const B* from, i64 stride, const i64* units, int count) {
  if (units)
    for (int i = 0; i < count; ++i) to[i] = from[units[i] * stride];
  else
    for (int i = 0; i < count; ++i) to[i] = from[i * stride];
}

// A strip of values of type S in compute type C. Strips are read and written in whole vectors, up to the end of STRIP.
template <class S, class C>
void load_strip(C* x, const void* source, i64 at, i64 stride, const i64* units, int count) {
  using B = typename S::B;
  constexpr int LANES = S::LANES;
  const B* s = static_cast<const B*>(source) + at;
  alignas(64) B side_by_side[STRIP];
  if (units || stride != 1) gather(side_by_side, s, stride, units, count), s = side_by_side;
  int i = 0;
  for (; i < count; i += LANES) {
    if (i + LANES > count && s != side_by_side) {  // the source may end here
      std::memcpy(side_by_side, s + i, size_t(count - i) * sizeof(B));
      s = side_by_side - i;
    }
    const typename S::V v = S::load(s + i);
    if (sizeof(C) == sizeof(typename S::C))
      store(x + i, v);
    else
      for (int k = 0; k < LANES; ++k) x[i + k] = C(v[k]);
  }
}

template <class C>
void load_any(C* x, i64 type, const void* source, i64 at, i64 stride, const i64* units, int count) {
  switch (type) {
    case F32: return load_strip<AsF32, C>(x, source, at, stride, units, count);
    case BF16: return load_strip<AsBF16, C>(x, source, at, stride, units, count);
    case F16: return load_strip<AsF16, C>(x, source, at, stride, units, count);
    default: return load_strip<AsF64, C>(x, source, at, stride, units, count);
  }
}

// ---- stores ----

inline void put(void* to, const void* from, size_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream && bytes >= 256) {
    char* d = static_cast<char*>(to);
    const char* s = static_cast<const char*>(from);
    const size_t head = size_t(-reinterpret_cast<intptr_t>(d)) & 63;
    std::memcpy(d, s, head);
    d += head, s += head, bytes -= head;
    for (; bytes >= 64; bytes -= 64, d += 64, s += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#elif defined(__AVX__)
      _mm256_stream_si256((__m256i*)d, _mm256_loadu_si256((const __m256i*)s));
      _mm256_stream_si256((__m256i*)(d + 32), _mm256_loadu_si256((const __m256i*)(s + 32)));
#else
      for (int k = 0; k < 64; k += 16) _mm_stream_si128((__m128i*)(d + k), _mm_loadu_si128((const __m128i*)(s + k)));
#endif
    }
    std::memcpy(d, s, bytes);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

struct Row {                // one destination row
  i64 source;               // element offset in the source
  i64 target;               // element offset in the destination
  i64 unit[3];
  double factor;
  u8 code;                  // combined over the outer dims
  int mean_set;             // outer dims whose fill is mean
  bool literal;             // an outer dim is randomly filled: values are not scaled
  u64 virtual_linear, split_linear, target_linear;
};

inline int rank(u8 code) { return code == ZERO ? 0 : code == CONSTANT ? 1 : code == MEAN ? 2 : code == RANDOM ? 3 : 4; }

// a0 b0 a1 b1 …
template <class B>
inline void weave(B* to, const B* a, const B* b, int count) {
  for (int k = 0; k < count; ++k) to[2 * k] = a[k], to[2 * k + 1] = b[k];
}
#if defined(__AVX2__)
template <class B, class Low, class High>
inline void weave_256(B* to, const B* a, const B* b, int count, Low low, High high) {
  constexpr int LANES = 32 / int(sizeof(B));
  int k = 0;
  for (; k + LANES <= count; k += LANES) {
    const __m256i x = load<__m256i>(a + k), y = load<__m256i>(b + k), l = low(x, y), h = high(x, y);
    store(to + 2 * k, _mm256_permute2x128_si256(l, h, 0x20));
    store(to + 2 * k + LANES, _mm256_permute2x128_si256(l, h, 0x31));
  }
  for (; k < count; ++k) to[2 * k] = a[k], to[2 * k + 1] = b[k];
}
inline void weave(u16* to, const u16* a, const u16* b, int count) {
  weave_256(to, a, b, count, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi16(x, y); },
            [](__m256i x, __m256i y) { return _mm256_unpackhi_epi16(x, y); });
}
inline void weave(u32* to, const u32* a, const u32* b, int count) {
  weave_256(to, a, b, count, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi32(x, y); },
            [](__m256i x, __m256i y) { return _mm256_unpackhi_epi32(x, y); });
}
inline void weave(u64* to, const u64* a, const u64* b, int count) {
  weave_256(to, a, b, count, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi64(x, y); },
            [](__m256i x, __m256i y) { return _mm256_unpackhi_epi64(x, y); });
}
#endif

// Leaves of one strip: (leaves, count) bits, ready to be stored to the columns of a segment in several rows.
template <class B>
void store_leaves(B* target, const B* const* leaf, const Segment& s, i64 a, int count, bool stream, B* scratch) {
  const i64 n = s.leaves;
  if (s.scatter) {
    for (i64 r = 0; r < n; ++r) {
      const i64* at = s.scatter + r * s.count + a;
      for (int i = 0; i < count; ++i)
        if (at[i] >= 0) target[at[i]] = leaf[r][i];
    }
    return;
  }
  if (s.step == 1) {
    for (i64 r = 0; r < n; ++r)
      if (s.base[r] >= 0) put(target + s.base[r] + a, leaf[r], size_t(count) * sizeof(B), stream);
    return;
  }
  bool interleaved = s.step == n && n <= 8;
  for (i64 r = 0; interleaved && r < n; ++r) interleaved = s.base[r] == s.base[0] + r;
  if (interleaved && s.base[0] >= 0) {
    const B* l0 = leaf[0];
    const B* l1 = leaf[1];
    for (int i = 0; i < count;) {  // scratch holds one strip
      const int part = std::min<int>(count - i, STRIP / int(n));
      if (n == 2)
        weave(scratch, l0 + i, l1 + i, part);
      else
        for (i64 r = 0; r < n; ++r)
          for (int k = 0; k < part; ++k) scratch[k * n + r] = leaf[r][i + k];
      put(target + s.base[0] + (a + i) * n, scratch, size_t(part) * n * sizeof(B), stream);
      i += part;
    }
    return;
  }
  for (i64 r = 0; r < n; ++r)
    if (s.base[r] >= 0)
      for (int i = 0; i < count; ++i) target[s.base[r] + (a + i) * s.step] = leaf[r][i];
}

// Memory in whole vectors that can be read past what was asked for.
template <class X>
class Buffer {
  X* data_ = nullptr;
  size_t size_ = 0;

 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  X* reserve(size_t size) {
    if (size > size_) {
      std::free(data_);
      const size_t bytes = (size * sizeof(X) + 2 * 64 - 1) / 64 * 64;
      data_ = static_cast<X*>(aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      std::memset(static_cast<void*>(data_), 0, bytes);
      size_ = size;
    }
    return data_;
  }
  X* data() const { return data_; }
};

// What makes the strips of a destination: one for each thread.
struct Maker {
  virtual ~Maker() = default;
  // One strip of one segment, for all rows of an outer group that get the same values, or for one row.
  virtual void strip(const Row& row, const Row* rows, i64 row_count, const Segment& s, i64 a, int count, i64 outer_group) = 0;
  // Independent noise on a finished stretch of a row.
  virtual void independent(const Row&, bool, i64, i64) {}
};

template <class T>
class Machine : public Maker {
  using C = typename T::C;
  using B = typename T::B;
  using V = typename T::V;
  static constexpr int LANES = T::LANES;
  const Task& t;
  Buffer<C> values_;    // (leaves, STRIP)
  Buffer<B> stored_;    // (leaves, STRIP)
  Buffer<u32> words_;
  Buffer<u32> wide_;
  std::vector<const B*> pointers_;
  std::vector<const B*> repeated_;
  alignas(64) C base_[STRIP];
  alignas(64) float gathered_[STRIP];
  alignas(64) B scratch_[STRIP];
  alignas(64) C leans_[STRIP];

 public:
  explicit Machine(const Task& task) : t(task) {
    words_.reserve(STRIP + SLACK);
    std::memset(base_, 0, sizeof(base_));
    std::memset(gathered_, 0, sizeof(gathered_));
    std::memset(leans_, 0, sizeof(leans_));
  }

 private:
  void reserve(i64 leaves) {
    if (i64(pointers_.size()) < leaves) {
      values_.reserve(size_t(leaves) * STRIP);
      stored_.reserve(size_t(leaves) * STRIP);
      pointers_.resize(size_t(leaves));
      for (i64 r = 0; r < leaves; ++r) pointers_[size_t(r)] = stored_.data() + r * STRIP;
    }
  }

  const float* noise(i64 distribution, u64 linear, const i64* units, int count, u32 node, Purpose purpose, const u32* key) {
    if (!units) return draws(words_.data(), distribution, linear, count, node, purpose, key);
    i64 lo = units[0], hi = units[0];
    for (int i = 1; i < count; ++i) lo = std::min(lo, units[i]), hi = std::max(hi, units[i]);
    if (hi - lo < WIDE && hi - lo < 16 * i64(count)) {
      wide_.reserve(WIDE + SLACK);
      const float* all = draws(wide_.data(), distribution, linear + u64(lo), int(hi - lo + 1), node, purpose, key);
      for (int i = 0; i < count; ++i) gathered_[i] = all[units[i] - lo];
    } else {
      for (int i = 0; i < count; ++i) gathered_[i] = draw_one(distribution, linear + u64(units[i]), node, purpose, key);
    }
    return gathered_;
  }

  // scale · Π scale_d · virtual source, rounded to the destination type, for a strip of a segment
  void base(const Row& row, const Segment& s, i64 a, int count) {
    const u8 code = rank(row.code) <= rank(u8(s.code)) ? row.code : u8(s.code);
    const i64* units = s.units ? s.units + a : nullptr;
    const i64 first = s.units ? 0 : s.first + a;
    if (code == ZERO || code == CONSTANT) {
      const C value = code == ZERO ? C(0) : T::round(V{} + C(t.constant))[0];
      std::fill_n(base_, count, value);
      return;
    }
    if (code == RANDOM) {
      const float* raw = noise(0, row.virtual_linear + u64(first), units, count, 0, RANDOM_FILL, t.random_key);
      scaled(base_, raw, C(t.random_amplitude), count);
      return;
    }
    if (code == MEAN) {
      const int set = row.mean_set | (u8(s.code) == MEAN ? 8 : 0);
      const i64* stride = t.mean_stride[set];
      i64 at = 0;
      for (int d = 0; d < 3; ++d) at += row.unit[d] * stride[d];
      const C* table = static_cast<const C*>(t.means[set]) + at + first * stride[3];
      for (int i = 0; i < count; ++i) base_[i] = table[(units ? units[i] : i) * stride[3]];
    } else {
      load_any<C>(base_, t.source_type, t.source, row.source + first * t.column_source_stride, t.column_source_stride,
                  units, count);
    }
    if (!(row.literal || u8(s.code) == RANDOM)) {
      if (s.scale) {
        const double* scale = s.scale + a;
        for (int i = 0; i < count; ++i) base_[i] *= C(row.factor * scale[i]);
      } else if (row.factor != 1) {
        const C factor = C(row.factor);
        for (int i = 0; i < count; ++i) base_[i] *= factor;
      }
    }
    // source values of the destination's own type are rounded already, NaNs of float16 apart
    if (code == MEAN || t.source_type != t.target_type || s.scale || row.factor != 1 || t.target_type == F16)
      for (int i = 0; i < count; i += LANES) store(base_ + i, T::round(load<V>(base_ + i)));
  }

  // raw noise times an amplitude, rounded to the destination type
  static void scaled(C* to, const float* raw, C amplitude, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, T::round(T::noise(raw + i) * amplitude));
  }

  const Cuts* cuts(i64 leaves) const {
    const Cuts* c = t.cut;
    while (c->leaves != leaves) ++c;
    return c;
  }

  // Cut the base strip: leaves of `shape`-sized groups into values_, with signs.
  void cut(i64 shape, const double* lean, i64 lean_row, i64 lean_step, u64 linear, const i64* units, int count) {
    const Cuts* c = cuts(shape);
    C* v = values_.data();
    for (int i = 0; i < count; i += LANES) {
      const V x = load<V>(base_ + i);
      store(v + i, T::flip(x, T::sign(x)));
    }
    for (i64 k = 0; k + 1 < shape; ++k) {
      C* left = v + c->lo[k] * STRIP;
      C* right = v + c->mid[k] * STRIP;
      const double* g = lean + k * lean_row;
      if (lean_step)
        for (int i = 0; i < count; ++i) leans_[i] = C(g[i]);
      const C spread = C(c->spread[k]), one = C(g[0]), *leans = leans_, *x = base_;
      const bool even = !lean_step && g[0] == 0;
      const float* raw =
          t.tree_noise ? noise(t.distribution, linear, units, count, u32(c->node[k]), SPLIT, t.noise_key) : nullptr;
      const auto e = [=](int i) { return T::flip(T::noise(raw + i) * spread, T::sign(load<V>(x + i))); };
      if (raw && even) halve(left, right, count, [=](int i, V) { return e(i); });
      else if (raw && lean_step) halve(left, right, count, [=](int i, V w) { return load<V>(leans + i) * w + e(i); });
      else if (raw) halve(left, right, count, [=](int i, V w) { return one * w + e(i); });
      else if (lean_step) halve(left, right, count, [=](int i, V w) { return load<V>(leans + i) * w; });
      else halve(left, right, count, [=](int, V w) { return one * w; });
    }
    for (i64 r = 0; r < shape; ++r) {
      C* leaf = v + r * STRIP;
      for (int i = 0; i < count; i += LANES)
        store(leaf + i, T::flip(load<V>(leaf + i), T::sign(load<V>(base_ + i))));
    }
  }

  // big = rn(w/2 + |m|), at most w; w - big is exact. Signs are put on both.
  static inline void halves(V w, V m, V sign, V& left, V& right) {
    constexpr C MOST = std::numeric_limits<C>::max();
    V big = T::round_finite(w * C(0.5) + T::flip(m, T::sign(m)));
    big = big < w ? big : w;
    const V small = w - (big < MOST ? big : V{} + MOST);  // of infinity, infinity
    const V other = T::where(m < C(0), T::flip(big, small));
    left = T::flip(T::flip(big, sign), other);
    right = T::flip(T::flip(small, sign), other);
  }

  // left, right = the halves of left
  template <class F>
  static inline void halve(C* left, C* right, int count, F lean) {
    for (int i = 0; i < count; i += LANES) {
      const V w = load<V>(left + i);
      V l, r;
      halves(w, lean(i, w), V{}, l, r);
      store(left + i, l);
      store(right + i, r);
    }
  }

  // The commonest cut, fused: even pairs, straight to their bits.
  template <bool NOISE>
  void pair(u64 linear, const i64* units, const Cuts* c, int count) {
    const float* raw = NOISE ? raw_of(linear, units, c, count) : nullptr;
    pair_to<NOISE>(raw, C(c->spread[0]), 0, count, [this](int i, V l, V r) {
      T::store(stored_.data() + i, l);
      T::store(stored_.data() + STRIP + i, r);
    });
  }

  // The same with noise, and to where they go: stores between the arithmetic, not after it, do not make it wait. Each
  // half to `copies` places, all aligned to lines of the cache.
  void stream_pair(u64 linear, const i64* units, const Cuts* c, int count, B* const* left, B* const* right, i64 copies) {
    const float* raw = raw_of(linear, units, c, count);
    const int whole = count / LANES * LANES;
    pair_to<true>(raw, C(c->spread[0]), 0, whole, [=](int i, V l, V r) {
      for (i64 k = 0; k < copies; ++k) T::stream(left[k] + i, l), T::stream(right[k] + i, r);
    });
    if (whole == count) return;
    pair_to<true>(raw, C(c->spread[0]), whole, count, [this](int i, V l, V r) {
      T::store(stored_.data() + i, l);
      T::store(stored_.data() + STRIP + i, r);
    });
    const size_t bytes = size_t(count - whole) * sizeof(B);
    for (i64 k = 0; k < copies; ++k) {
      std::memcpy(left[k] + whole, stored_.data() + whole, bytes);
      std::memcpy(right[k] + whole, stored_.data() + STRIP + whole, bytes);
    }
  }

  const float* raw_of(u64 linear, const i64* units, const Cuts* c, int count) {
    return noise(t.distribution, linear, units, count, u32(c->node[0]), SPLIT, t.noise_key);
  }

  template <bool NOISE, class F>
  void pair_to(const float* raw, C spread, int from, int to, F put) {
    for (int i = from; i < to; i += LANES) {
      const V x = load<V>(base_ + i), sign = T::sign(x);
      V l, r;
      halves(T::flip(x, sign), NOISE ? T::flip(T::noise(raw + i) * spread, sign) : V{}, sign, l, r);
      put(i, l, r);
    }
  }

  // Whether a strip of a segment goes to runs of columns that all begin with a line of the cache: where, of each leaf.
  bool lines(B* row, const Segment& s, i64 a, int count, B** at) const {
    if (!t.stream || s.scatter || s.step != 1 || s.leaves > 4 || count < 64) return false;
    for (i64 r = 0; r < s.leaves; ++r) {
      at[r] = row + s.base[r] + a;
      if (s.base[r] < 0 || reinterpret_cast<uintptr_t>(at[r]) & 63) return false;
    }
    return true;
  }

  void convert(B* to, const C* from, int count) {
    for (int i = 0; i < count; i += LANES) T::store(to + i, load<V>(from + i));
  }

  void pairs(i64 leaves, u64 linear, const i64* units, int count) {
    for (i64 r = 0; r < leaves; ++r) std::fill_n(values_.data() + r * STRIP, count, C(0));
    for (i64 k = 0; k < leaves / 2; ++k) {
      const float* raw = noise(t.distribution, linear, units, count, u32(k + 1), PAIR, t.noise_key);
      C* plus = values_.data() + 2 * k * STRIP;
      C* minus = plus + STRIP;
      scaled(plus, raw, C(t.pair_amplitude), count);
      for (int i = 0; i < count; ++i) minus[i] = -plus[i];
    }
  }

  void repeat(i64 leaves, const B* strip) {
    if (i64(repeated_.size()) < leaves || repeated_[0] != strip) repeated_.assign(size_t(leaves), strip);
  }

 public:
  void strip(const Row& row, const Row* rows, i64 row_count, const Segment& s, i64 a, int count, i64 outer_group) override {
    B* target = static_cast<B*>(t.target);
    base(row, s, a, count);
    const i64* units = s.units ? s.units + a : nullptr;
    if (outer_group >= 0) {  // an outer dim is split: rows are the leaves
      const Outer& o = t.outer[t.split_outer];
      const i64 shape = o.shape[outer_group];
      const bool paired = o.paired && o.paired[outer_group] > 0;
      const bool even = !paired && shape == 2 && o.lean[o.lean_at[outer_group]] == 0;
      const i64 from = o.start[outer_group], here = o.start[outer_group + 1] - from;
      const i64 leaves = paired ? o.paired[outer_group] : shape;
      reserve(std::max<i64>(leaves, 2));
      // noise goes by destination column; then the segment is one destination run
      const u64 linear = row.split_linear + u64(t.column_offset + (s.scatter ? 0 : s.base[0] + a));
      const bool addressed = t.tree_noise || paired;
      B *left[4], *right[4];
      if (even && t.tree_noise && here == 2 && row_count == 1 &&
          lines(target + rows[0].target + o.entry[from + (o.leaf[from] != 0)] * o.target_stride, s, a, count, left) &&
          lines(target + rows[0].target + o.entry[from + (o.leaf[from] == 0)] * o.target_stride, s, a, count, right))
        return stream_pair(linear, nullptr, cuts(2), count, left, right, s.leaves);
      if (paired) pairs(leaves, linear, nullptr, count);
      else if (even && t.tree_noise) pair<true>(linear, nullptr, cuts(2), count);
      else if (even) pair<false>(0, nullptr, cuts(2), count);
      else cut(shape, o.lean + o.lean_at[outer_group], 1, 0, addressed ? linear : 0, nullptr, count);
      for (i64 k = 0; k < here; ++k) {
        B* bits = stored_.data() + o.leaf[from + k] * STRIP;
        if (!even) convert(bits, values_.data() + o.leaf[from + k] * STRIP, count);
        repeat(s.leaves, bits);
        for (i64 r = 0; r < row_count; ++r)
          store_leaves(target + rows[r].target + o.entry[from + k] * o.target_stride, repeated_.data(), s, a, count,
                       t.stream, scratch_);
      }
      return;
    }
    const i64 leaves = s.leaves;
    if (s.paired) {
      reserve(leaves);
      pairs(leaves, row.split_linear + u64(units ? 0 : s.first + a), units, count);
    } else if (s.split && leaves == 2 && !s.lean_step && s.lean[0] == 0) {
      reserve(2);
      const u64 linear = row.split_linear + u64(units ? 0 : s.first + a);
      B* at[4];
      if (t.tree_noise && row_count == 1 && lines(target + rows[0].target, s, a, count, at))
        return stream_pair(linear, units, cuts(2), count, at, at + 1, 1);
      if (t.tree_noise) pair<true>(linear, units, cuts(2), count);
      else pair<false>(linear, units, cuts(2), count);
      for (i64 k = 0; k < row_count; ++k)
        store_leaves(target + rows[k].target, pointers_.data(), s, a, count, t.stream, scratch_);
      return;
    } else if (s.split) {
      reserve(leaves);
      cut(leaves, s.lean + (s.lean_step ? a : 0), s.lean_step ? s.count : 1, s.lean_step,
          row.split_linear + u64(units ? 0 : s.first + a), units, count);
    } else {
      reserve(1);
      convert(stored_.data(), base_, count);
      repeat(leaves, stored_.data());
      for (i64 k = 0; k < row_count; ++k)
        store_leaves(target + rows[k].target, repeated_.data(), s, a, count, t.stream, scratch_);
      return;
    }
    for (i64 r = 0; r < leaves; ++r) convert(stored_.data() + r * STRIP, values_.data() + r * STRIP, count);
    for (i64 k = 0; k < row_count; ++k)
      store_leaves(target + rows[k].target, pointers_.data(), s, a, count, t.stream, scratch_);
  }

  void independent(const Row& row, bool row_copy, i64 from, i64 to) override {
    B* x = static_cast<B*>(t.target) + row.target;
    const C amplitude = C(t.independent_amplitude);
    for (i64 c = from; c < to; c += STRIP) {
      const int count = int(std::min<i64>(STRIP, to - c));
      const float* raw = draws(words_.data(), t.distribution, row.target_linear + u64(t.column_offset + c), count, 0,
                               INDEPENDENT, t.noise_key);
      std::memcpy(scratch_, x + c, size_t(count) * sizeof(B));
      for (int i = 0; i < count; i += LANES)
        T::store(scratch_ + i, T::round(T::load(scratch_ + i) + T::noise(raw + i) * amplitude));
      for (int i = 0; i < count; ++i)
        if (row_copy || (t.column_copy && t.column_copy[c + i])) x[c + i] = scratch_[i];
    }
  }
};

// Bits as they are: no computing, any type of 1, 2, 4, 8 or 16 bytes.
struct Bits16 { u64 a, b; };
template <class B>
class Copier : public Maker {
  const Task& t;
  std::vector<const B*> repeated_;
  alignas(64) B strip_[STRIP];
  alignas(64) B scratch_[STRIP];

 public:
  explicit Copier(const Task& task) : t(task) {}
  void strip(const Row& row, const Row* rows, i64 row_count, const Segment& s, i64 a, int count, i64) override {
    const u8 code = rank(row.code) <= rank(u8(s.code)) ? row.code : u8(s.code);
    const B* from = strip_;
    if (code == OLD) {
      const B* source = static_cast<const B*>(t.source) + row.source;
      const i64 stride = t.column_source_stride;
      const i64* units = s.units ? s.units + a : nullptr;
      const B* first = source + (units ? 0 : (s.first + a) * stride);
      if (!units && stride == 1) from = first;
      else gather(strip_, first, stride, units, count);
    } else {
      B value;
      std::memset(&value, 0, sizeof(B));
      if (code == CONSTANT) std::memcpy(&value, t.constant_bits, sizeof(B));
      std::fill_n(strip_, count, value);
    }
    repeated_.assign(size_t(s.leaves), from);
    for (i64 k = 0; k < row_count; ++k)
      store_leaves(static_cast<B*>(t.target) + rows[k].target, repeated_.data(), s, a, count, t.stream, scratch_);
  }
};

// Rows of the outer group (g0, g1, g2); a group that is split contributes one pseudo-entry, its leaves come later.
void enumerate(const Task& t, const i64* group, i64 split_group, std::vector<Row>& rows, std::vector<u8>& copies) {
  rows.clear();
  copies.clear();
  i64 from[3] = {0, 0, 0}, count[3] = {1, 1, 1};
  for (int d = 0; d < t.rows_outer; ++d) {
    from[d] = t.outer[d].start[group[d]];
    count[d] = d == t.split_outer && split_group >= 0 ? 1 : t.outer[d].start[group[d] + 1] - from[d];
  }
  for (i64 a = 0; a < count[0]; ++a)
    for (i64 b = 0; b < count[1]; ++b)
      for (i64 c = 0; c < count[2]; ++c) {
        const i64 pick[3] = {from[0] + a, from[1] + b, from[2] + c};
        Row row{};
        row.factor = t.scale;
        row.code = OLD;
        u8 copy = 0;
        for (int d = 0; d < t.rows_outer; ++d) {
          const Outer& o = t.outer[d];
          const i64 unit = o.unit[group[d]], entry = o.entry[pick[d]], global = entry + o.offset;
          const u8 code = o.code[group[d]];
          const bool leaves = d == t.split_outer && split_group >= 0;
          row.unit[d] = unit;
          row.source += unit * o.source_stride;
          row.virtual_linear += u64(unit) * u64(o.virtual_linear);
          row.split_linear += u64(d == t.split_outer ? unit : global) * u64(o.split_linear);
          if (!leaves) {
            row.target += entry * o.target_stride;
            row.target_linear += u64(global) * u64(o.target_linear);
          }
          if (o.scale) row.factor *= o.scale[entry];
          if (rank(code) < rank(row.code)) row.code = code;
          if (code == MEAN) row.mean_set |= 1 << d;
          if (code == RANDOM) row.literal = true;
          if (o.copy && !leaves) copy |= o.copy[entry];
        }
        rows.push_back(row);
        copies.push_back(copy);
      }
}

Maker* maker(const Task& t) {
  switch (t.item_bytes) {
    case 0: break;
    case 1: return new Copier<u8>(t);
    case 2: return new Copier<u16>(t);
    case 4: return new Copier<u32>(t);
    case 8: return new Copier<u64>(t);
    case 16: return new Copier<Bits16>(t);
    default: return nullptr;
  }
  switch (t.target_type) {
    case F32: return new Machine<AsF32>(t);
    case BF16: return new Machine<AsBF16>(t);
    case F16: return new Machine<AsF16>(t);
    case F64: return new Machine<AsF64>(t);
    default: return nullptr;
  }
}

// The floating-point mode of C while it lives: no subnormal value is taken for zero, whatever the process asked for.
struct Exactly {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  Exactly() { _mm_setcsr(0x1F80); }
  ~Exactly() { _mm_setcsr(before); }
#endif
};

// Call work() on so many threads at once, this one among them; where one does not start, the others do its part. They
// live for one call: a pool would not survive fork().
template <class F>
void on_threads(i64 count, F work) {
#ifdef THREADS
  std::vector<pthread_t> started;
  started.reserve(size_t(count));
  const auto entry = [](void* f) -> void* {
    (*static_cast<F*>(f))();
    return nullptr;
  };
  for (i64 k = 1; k < count; ++k) {
    pthread_t id;
    if (pthread_create(&id, nullptr, entry, &work)) break;
    started.push_back(id);
  }
  work();
  for (pthread_t id : started) pthread_join(id, nullptr);
#else
  work();
#endif
}

int run(const Task& t) {
  i64 groups[3] = {1, 1, 1}, total = 1;
  bool scaled = false;
  for (int d = 0; d < t.rows_outer; ++d) {
    groups[d] = t.outer[d].groups;
    total *= groups[d];
    scaled |= t.outer[d].scale != nullptr && d != t.split_outer;
  }
  // whether rows that copy the same source row get the same values
  const bool same = !scaled && !t.tree_noise && !t.pair_noise;
  std::vector<i64> strips(size_t(t.segments) + 1, 0);
  for (i64 s = 0; s < t.segments; ++s) strips[size_t(s) + 1] = strips[size_t(s)] + (t.segment[s].count + STRIP - 1) / STRIP;
  const i64 per_row = strips.back();
  if (per_row == 0 || total == 0) return 0;
  i64 chunks = 1;  // pieces of a row that different threads may take
  if (!t.independent && total < 8 * t.threads) chunks = std::min(per_row, (8 * t.threads + total - 1) / total);
  const i64 tasks = total * chunks;
  const i64 grain = std::max<i64>(1, std::min<i64>(tasks / (8 * t.threads), (1 << 16) / std::max<i64>(1, per_row * STRIP / chunks) + 1));
  std::atomic<i64> next{0};
  std::atomic<int> status{0};
  const auto work = [&] {
    const Exactly mode;
    std::unique_ptr<Maker> machine(maker(t));
    if (!machine) {
      status = 2;
      return;
    }
    std::vector<Row> rows;
    std::vector<u8> copies;
    for (i64 task = 0, end = 0;; ++task) {
      if (task == end) {
        task = next.fetch_add(grain);
        end = std::min(tasks, task + grain);
        if (task >= tasks || status) break;
      }
      const i64 chunk = task % chunks;
      i64 rest = task / chunks, group[3];
      for (int d = 2; d >= 0; --d) group[d] = rest % groups[d], rest /= groups[d];
      i64 split_group = -1;
      if (t.split_outer >= 0) {
        const Outer& o = t.outer[t.split_outer];
        const i64 g = group[t.split_outer];
        if (o.shape[g] > 0 || (o.paired && o.paired[g] > 0)) split_group = g;
      }
      enumerate(t, group, split_group, rows, copies);
      const i64 first = per_row * chunk / chunks, last = per_row * (chunk + 1) / chunks, count = i64(rows.size());
      for (i64 r = 0; r < count; r += same ? count : 1) {
        i64 s = std::upper_bound(strips.begin(), strips.end(), first) - strips.begin() - 1;
        for (i64 at = first; at < last; ++at) {
          while (at >= strips[size_t(s) + 1]) ++s;
          const Segment& segment = t.segment[s];
          const i64 a = (at - strips[size_t(s)]) * STRIP;
          const int n = int(std::min<i64>(STRIP, segment.count - a));
          machine->strip(rows[size_t(r)], &rows[size_t(r)], same ? count : 1, segment, a, n, split_group);
        }
      }
      if (t.independent && split_group < 0)
        for (i64 r = 0; r < count; ++r) machine->independent(rows[size_t(r)], copies[size_t(r)] != 0, 0, t.columns);
      if (t.independent && split_group >= 0) {
        const Outer& o = t.outer[t.split_outer];
        for (i64 e = o.start[split_group]; e < o.start[split_group + 1]; ++e)
          for (i64 r = 0; r < count; ++r) {
            Row row = rows[size_t(r)];
            row.target += o.entry[e] * o.target_stride;
            row.target_linear += u64(o.entry[e] + o.offset) * u64(o.target_linear);
            machine->independent(row, copies[size_t(r)] || (o.copy && o.copy[o.entry[e]]), 0, t.columns);
          }
      }
    }
#if defined(__x86_64__)
    if (t.stream) _mm_sfence();
#endif
  };
  on_threads(std::min(t.threads, (tasks + grain - 1) / grain), [&] {
    try {
      work();
    } catch (...) {
      status = 1;
    }
  });
  return status;
}

}  // namespace

extern "C" {

int fxgrow_abi() { return int(sizeof(Task)) * 10000 + int(sizeof(Segment)) * 100 + int(sizeof(Outer)) % 100; }

// 0, 1 without memory, 2 for a type that is not known
int fxgrow_run(const Task* t) {
  try {
    return run(*t);
  } catch (...) {
    return 1;
  }
}

// Many small tensors, each on one thread.
int fxgrow_run_many(const Task* tasks, i64 count, i64 threads) {
  std::atomic<i64> next{0};
  std::atomic<int> status{0};
  try {
    on_threads(std::min(threads, count), [&] {
      for (i64 k = next++; k < count; k = next++)
        if (const int s = fxgrow_run(tasks + k)) status = s;
    });
  } catch (...) {
    return 1;
  }
  return status;
}

// Take the pages of a fresh allocation, which nothing has touched, from the system: one call for many pages costs less
// than a fault for each. Contents that are there already are kept. Returns the bytes that got huge pages.
//
// Huge pages are several times cheaper, if the system has them at hand. Where it has to compact memory first, or a
// hypervisor has taken free memory back, they are several times dearer: each is timed, and after one of more than `dear` CPU
// seconds the others are small, unless two in a row of 2 MiB of these take more than `dear_small`.
i64 fxgrow_take_pages(void* start, i64 bytes, i64 want_huge, double dear, double dear_small, i64 threads) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), size = uintptr_t(2) << 20;
  const uintptr_t lo = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t hi = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
  if (hi <= lo) return 0;
  auto advise = [=](int what) { return madvise(reinterpret_cast<void*>(lo), hi - lo, what) == 0; };
  auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  };
  enum Mode { SMALL, HUGE, SMALL_AFTER_DEAR, HUGE_AFTER_ALL };
  std::atomic<int> mode{want_huge && advise(MADV_HUGEPAGE) ? HUGE : SMALL}, slow{0};
  std::atomic<i64> next{0}, huge_bytes{0};
  std::atomic<bool> works{true};
  const uintptr_t first = lo / size;
  const i64 regions = i64((hi - 1) / size - first) + 1;
  const auto work = [&] {
    while (works) {
      const i64 region = next++;
      if (region >= regions) break;
      const uintptr_t from = std::max(lo, (first + uintptr_t(region)) * size);
      const uintptr_t to = std::min(hi, (first + uintptr_t(region) + 1) * size);
      int was = mode;
      const double before = now();
      if (madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE)) works = false;  // before Linux 5.14
      const bool whole = to - from == size, huge = was == HUGE || was == HUGE_AFTER_ALL;
      if (whole && huge) huge_bytes += i64(size);
      if (!whole || (was != HUGE && was != SMALL_AFTER_DEAR)) continue;
      if (now() - before <= (huge ? dear : dear_small)) {
        slow = 0;
      } else if (huge || ++slow == 2) {
        slow = 0;
        if (mode.compare_exchange_strong(was, huge ? SMALL_AFTER_DEAR : HUGE_AFTER_ALL))
          advise(huge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
      }
    }
  };
  try {
    on_threads(regions > 8 ? threads : 1, work);
  } catch (...) {
    return 0;
  }
  return works ? i64(huge_bytes) : 0;
#else
  return 0;
#endif
}
}
