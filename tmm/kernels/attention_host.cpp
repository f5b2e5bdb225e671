// Statistics of scaled-dot-product attention per head, on a CPU, without the matrix of logits.
//
// Queries are cut into strips, one query to a lane, so that every step of the softmax runs down the
// lanes and nothing is reduced across a vector. A thread takes a few strips that read the same keys
// and meets the keys block by block: each block is converted once, multiplied with every strip, and
// joined into the running maximum, sum of exponentials and sum of exponential times logit.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

// Inductor compiles without fused multiply-add, which is half the speed and less accurate.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDE = 4;  // of a vector; vectors in a strip
#elif defined(__AVX__)
constexpr int BYTES = 32, WIDE = 2;
#else
constexpr int BYTES = 16, WIDE = 4;
#endif
constexpr int NARROW = 1;       // vectors in a strip of few queries
constexpr int BLOCK = 96;       // keys: their logits with a strip stay in the first-level cache
constexpr int MOST_STRIPS = 8;  // that a thread takes at a time, fewer where threads are many

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

double convert(double value) { return value; }
float convert(float value) { return value; }
float convert(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
float convert(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
  // The exponent's bias grows by 112; that of infinity and NaN is all ones in both.
  const uint32_t bias = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + bias;
  const uint32_t subnormal = as_bits(float(int32_t(magnitude)) * (1.0f / (1 << 24)));
  return as_float(sign | (magnitude < 0x400 ? subnormal : normal));
}

template <class Scalar>
struct Lanes {
  typedef Scalar type __attribute__((vector_size(BYTES)));
};
template <class Scalar>
using Vector = typename Lanes<Scalar>::type;
template <class Scalar>
using Mask = decltype(Vector<Scalar>{} == Vector<Scalar>{});  // -1 where it holds

template <class Scalar>
constexpr int WIDTH = BYTES / sizeof(Scalar);
template <class Scalar>
constexpr Scalar INFINITE = std::numeric_limits<Scalar>::infinity();
constexpr double UNDEFINED = std::numeric_limits<double>::quiet_NaN();

template <class Scalar>
Vector<Scalar> load(const Scalar* from) {
  Vector<Scalar> values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

template <class Scalar>
void store(Scalar* to, Vector<Scalar> values) {
  std::memcpy(to, &values, sizeof(values));
}

// Deviations from the maximum are raised to this, whose exponential is 0 exactly.
template <class Scalar>
constexpr Scalar LOWEST = sizeof(Scalar) == 8 ? -750 : -88;

template <class Scalar>
Vector<Scalar> deviation(Vector<Scalar> values, Vector<Scalar> maximum) {
  const Vector<Scalar> difference = values - maximum, lowest = Vector<Scalar>{} + LOWEST<Scalar>;
  return difference < lowest ? lowest : difference;  // NaN stays
}

// Of values from LOWEST to 0, within 2 units in the last place; NaN of NaN.
Vector<float> exponential(Vector<float> x) {
  constexpr float ROUND = 3 << 22;  // adding it leaves no fraction
  constexpr float LOG2_HIGH = 0.693359375f, LOG2_LOW = -2.12194440e-4f;
  const Vector<float> rounded = x * 1.44269504f + ROUND, power = rounded - ROUND;
  const Vector<float> rest = (x - power * LOG2_HIGH) - power * LOG2_LOW;
  // The polynomial of least relative error up to log(2) / 2, with 1 at 0.
  Vector<float> result = rest * 0.008290272206068039f + 0.04189816117286682f;
  result = result * rest + 0.1666763871908188f;
  result = result * rest + 0.4999914765357971f;
  result = result * rest + 0.9999997019767761f;
  result = result * rest + 1.0f;
  Vector<uint32_t> bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << 23) + (127u << 23);
  Vector<float> two_to_power;  // 0 at LOWEST
  std::memcpy(&two_to_power, &bits, sizeof(bits));
  return result * two_to_power;
}

Vector<double> exponential(Vector<double> x) {
  for (int lane = 0; lane < WIDTH<double>; lane++) x[lane] = std::exp(x[lane]);
  return x;
}

// What Python passes; strides count elements, over (batch, head, row, column).
struct Call {
  const char *query, *key, *mask;
  int64_t query_strides[4], key_strides[4], mask_strides[4];
  int64_t batch, heads, key_heads, queries, keys, channels;
  int64_t mask_type;   // see `mask_reader`
  int64_t query_step;  // distance of the measured queries in the sequence
  int64_t is_causal;
  int64_t threads;
  double scale;
  double* result;
};

// The columns in the order of ATTENTION_COLUMNS in attention.py.
struct Row {
  double count = 0, entropy = 0, normalized_entropy = 0, logsumexp = 0;
  double max_probability = 0, sink_mass = 0, max_logit = -INFINITE<double>;
};

void merge(Row& left, const Row& right) {
  left.count += right.count;
  left.entropy += right.entropy;
  left.normalized_entropy += right.normalized_entropy;
  left.logsumexp += right.logsumexp;
  left.max_probability += right.max_probability;
  left.sink_mass += right.sink_mass;
  if (right.max_logit > left.max_logit || std::isnan(right.max_logit))
    left.max_logit = right.max_logit;  // NaN stays, as nothing is above it
}

template <class Scalar>
struct Strip {
  int64_t head, first, queries;  // `first` counts measured queries
  int64_t position, end;         // of the first query in the sequence; keys that any of them sees
  int vectors;
  Scalar* packed;  // (channels, lanes)
  Vector<Scalar> maximum[WIDE], total[WIDE], weighted[WIDE], sink[WIDE];
  Mask<Scalar> positions[WIDE], allowed[WIDE];  // `allowed` counts keys, only where a mask says it
};

// Begin with the strip of some queries of a head; `packed` is where they are to lie.
template <class Element, class Scalar>
void begin(const Call& call, int64_t batch, int64_t head, int64_t first, Scalar* packed,
           Strip<Scalar>& strip) {
  constexpr int64_t LANES = WIDE * WIDTH<Scalar>;
  const int64_t remaining = call.queries - first;
  strip.head = head;
  strip.first = first;
  strip.queries = remaining < LANES ? remaining : LANES;
  strip.position = first * call.query_step;
  strip.end = call.keys;
  const int64_t seen = strip.position + (strip.queries - 1) * call.query_step + 1;
  if (call.is_causal && seen < strip.end) strip.end = seen;
  strip.vectors = strip.queries <= WIDTH<Scalar> ? NARROW : WIDE;
  strip.packed = packed;

  const int64_t* strides = call.query_strides;
  const Element* from = reinterpret_cast<const Element*>(call.query) + batch * strides[0] +
                        head * strides[1] + first * strides[2];
  const int64_t lanes = strip.vectors * WIDTH<Scalar>;
  for (int64_t lane = 0; lane < lanes; lane++) {
    const bool inside = lane < strip.queries;
    for (int64_t channel = 0; channel < call.channels; channel++)
      packed[channel * lanes + lane] =
          inside ? convert(from[lane * strides[2] + channel * strides[3]]) : Scalar(0);
  }
  for (int vector = 0; vector < WIDE; vector++) {
    strip.maximum[vector] = strip.sink[vector] = Vector<Scalar>{} - INFINITE<Scalar>;
    strip.total[vector] = strip.weighted[vector] = Vector<Scalar>{};
    strip.allowed[vector] = Mask<Scalar>{};
    for (int lane = 0; lane < WIDTH<Scalar>; lane++)
      strip.positions[vector][lane] =
          strip.position + (vector * WIDTH<Scalar> + lane) * call.query_step;
  }
}

// Keys as (BLOCK, channels), zeros behind the last.
template <class Element, class Scalar>
void pack_keys(const Call& call, const Element* from, int64_t keys, Scalar* packed) {
  const int64_t channels = call.channels, step = call.key_strides[3];
  for (int64_t key = 0; key < BLOCK; key++) {
    const Element* row = from + key * call.key_strides[2];
    Scalar* to = packed + key * channels;
    if (key >= keys) {
      std::memset(to, 0, channels * sizeof(Scalar));
    } else if (step == 1) {
#pragma omp simd
      for (int64_t channel = 0; channel < channels; channel++) to[channel] = convert(row[channel]);
    } else {
      for (int64_t channel = 0; channel < channels; channel++)
        to[channel] = convert(row[channel * step]);
    }
  }
}

// Scaled products of a strip with some keys, as (KEYS, lanes).
template <class Scalar, int VECTORS, int KEYS>
void multiply(const Scalar* queries, const Scalar* keys, int64_t channels, Scalar scale,
              Scalar* logits) {
  constexpr int LANES = VECTORS * WIDTH<Scalar>;
  Vector<Scalar> sums[KEYS][VECTORS] = {};
  for (int64_t channel = 0; channel < channels; channel++) {
    Vector<Scalar> query[VECTORS];
    for (int vector = 0; vector < VECTORS; vector++)
      query[vector] = load(queries + channel * LANES + vector * WIDTH<Scalar>);
    for (int key = 0; key < KEYS; key++) {
      const Scalar factor = keys[key * channels + channel];
      for (int vector = 0; vector < VECTORS; vector++) sums[key][vector] += query[vector] * factor;
    }
  }
  for (int key = 0; key < KEYS; key++)
    for (int vector = 0; vector < VECTORS; vector++)
      store(logits + key * LANES + vector * WIDTH<Scalar>, sums[key][vector] * scale);
}

// Read the mask of a strip and some keys as what is added to logits, (keys, lanes), minus infinity
// where it forbids a key. Returns whether it allows any.
template <class Scalar>
using MaskReader = bool (*)(const Call&, int64_t batch, const Strip<Scalar>&, int64_t start,
                            int64_t keys, Scalar* added);

template <class Scalar>
Scalar added_by(bool allowed) {
  const Scalar values[] = {-INFINITE<Scalar>, 0};  // no branch, as nothing predicts a mask
  return values[allowed];
}
template <class Scalar, class Element>
Scalar added_by(Element element) {
  // As `forbidden_up_to` in attention.py.
  constexpr int limit = std::is_same_v<Element, BFloat16> ? -9984 : -9999;
  const Scalar value = convert(element);
  return value <= limit ? -INFINITE<Scalar> : value;  // NaN stays
}

template <class Scalar, class Element>
bool read_mask(const Call& call, int64_t batch, const Strip<Scalar>& strip, int64_t start,
               int64_t keys, Scalar* added) {
  const int64_t* strides = call.mask_strides;
  const Element* from = reinterpret_cast<const Element*>(call.mask) + batch * strides[0] +
                        strip.head * strides[1] + strip.first * strides[2] + start * strides[3];
  const int64_t lanes = strip.vectors * WIDTH<Scalar>;
  const int64_t rows = strides[2] ? strip.queries : 1;  // equal rows are read once
  bool any = false;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t key = 0; key < keys; key++) {
      const Scalar value = added_by<Scalar>(from[row * strides[2] + key * strides[3]]);
      added[key * lanes + row] = value;
      any |= value != -INFINITE<Scalar>;
    }
  for (int64_t key = 0; key < keys; key++)
    for (int64_t lane = rows; lane < lanes; lane++) added[key * lanes + lane] = added[key * lanes];
  return any;
}

template <class Scalar>
MaskReader<Scalar> mask_reader(int64_t type) {
  const MaskReader<Scalar> readers[] = {
      nullptr,
      read_mask<Scalar, bool>,
      read_mask<Scalar, double>,
      read_mask<Scalar, float>,
      read_mask<Scalar, Float16>,
      read_mask<Scalar, BFloat16>,
  };
  return readers[type];
}

// Put minus infinity in place of the logits that are not allowed.
template <class Scalar, int VECTORS>
void forbid(Strip<Scalar>& strip, int64_t start, int64_t keys, bool is_causal, const Scalar* added,
            Scalar* logits) {
  typedef std::conditional_t<sizeof(Scalar) == 8, int64_t, int32_t> Index;
  for (int64_t key = 0; key < keys; key++)
    for (int vector = 0; vector < VECTORS; vector++) {
      const int64_t offset = (key * VECTORS + vector) * WIDTH<Scalar>;
      Vector<Scalar> values = load(logits + offset);
      const Vector<Scalar> forbidden = Vector<Scalar>{} - INFINITE<Scalar>;
      Mask<Scalar> allowed = Mask<Scalar>{} - 1;
      if (is_causal) allowed &= strip.positions[vector] >= Mask<Scalar>{} + Index(start + key);
      if (added) {
        const Vector<Scalar> addend = load(added + offset);
        allowed &= addend != forbidden;
        values += addend;
        strip.allowed[vector] -= allowed;
      }
      store(logits + offset, allowed ? values : forbidden);
    }
}

// Join logits into the running sums.
template <class Scalar, int VECTORS>
void accumulate(Strip<Scalar>& strip, const Scalar* logits, int64_t keys) {
  constexpr int LANES = VECTORS * WIDTH<Scalar>;
  Vector<Scalar> maximum[VECTORS];
  for (int vector = 0; vector < VECTORS; vector++) maximum[vector] = strip.maximum[vector];
  for (int64_t key = 0; key < keys; key++)
    for (int vector = 0; vector < VECTORS; vector++) {
      const Vector<Scalar> values = load(logits + key * LANES + vector * WIDTH<Scalar>);
      maximum[vector] = values > maximum[vector] ? values : maximum[vector];
    }
  for (int vector = 0; vector < VECTORS; vector++) {
    const Vector<Scalar> none = Vector<Scalar>{} - INFINITE<Scalar>;
    const Vector<Scalar> centre = maximum[vector] == none ? Vector<Scalar>{} : maximum[vector];
    Vector<Scalar> total = {}, weighted = {};
    for (int64_t key = 0; key < keys; key++) {
      const Vector<Scalar> values = load(logits + key * LANES + vector * WIDTH<Scalar>);
      const Vector<Scalar> exponent = deviation<Scalar>(values, centre);
      const Vector<Scalar> term = exponential(exponent);
      total += term;
      weighted += term * exponent;
    }
    const Vector<Scalar> change = deviation<Scalar>(strip.maximum[vector], centre);
    const Vector<Scalar> factor = exponential(change);
    strip.weighted[vector] =
        factor * (strip.weighted[vector] + change * strip.total[vector]) + weighted;
    strip.total[vector] = factor * strip.total[vector] + total;
    strip.maximum[vector] = maximum[vector];
  }
}

template <class Scalar, int VECTORS>
void meet_keys(const Call& call, Strip<Scalar>& strip, const Scalar* packed, int64_t start,
               int64_t keys, const Scalar* added, Scalar* logits) {
  constexpr int KEYS = VECTORS == NARROW ? 12 : 6, LANES = VECTORS * WIDTH<Scalar>;
  static_assert(BLOCK % KEYS == 0, "a block is whole tiles");
  for (int64_t key = 0; key < keys; key += KEYS)
    multiply<Scalar, VECTORS, KEYS>(strip.packed, packed + key * call.channels, call.channels,
                                    Scalar(call.scale), logits + key * LANES);
  const bool is_causal = call.is_causal && start + keys - 1 > strip.position;
  if (is_causal || added) forbid<Scalar, VECTORS>(strip, start, keys, is_causal, added, logits);
  if (start == 0)
    for (int vector = 0; vector < VECTORS; vector++)
      strip.sink[vector] = load(logits + vector * WIDTH<Scalar>);
  accumulate<Scalar, VECTORS>(strip, logits, keys);
}

template <class Scalar>
Row finish(const Call& call, const Strip<Scalar>& strip) {
  Row row;
  for (int64_t query = 0; query < strip.queries; query++) {
    const int64_t vector = query / WIDTH<Scalar>, lane = query % WIDTH<Scalar>;
    int64_t allowed = call.keys;
    const int64_t position = strip.positions[vector][lane];
    if (call.is_causal && position < call.keys) allowed = position + 1;
    if (call.mask_type) allowed = strip.allowed[vector][lane];
    if (allowed == 0) continue;
    double total = strip.total[vector][lane], maximum = strip.maximum[vector][lane];
    // A logit is NaN or infinite, or none is finite.
    if (!(total > 0)) total = maximum = UNDEFINED;
    Row own;
    own.count = 1;
    own.entropy = std::log(total) - strip.weighted[vector][lane] / total;
    if (own.entropy < 0) own.entropy = 0;
    own.normalized_entropy = own.entropy / (allowed > 1 ? std::log(double(allowed)) : 1);
    own.logsumexp = maximum + std::log(total);
    own.max_probability = 1 / total;
    own.sink_mass = std::exp(strip.sink[vector][lane] - maximum) / total;
    own.max_logit = maximum;
    merge(row, own);
  }
  return row;
}

// Scratch memory of a thread, aligned to vectors.
template <class Scalar>
struct Buffer {
  struct alignas(BYTES) Piece {
    Scalar values[WIDTH<Scalar>];
  };
  std::vector<Piece> pieces;
  Scalar* data;
  explicit Buffer(int64_t size) : pieces(size / WIDTH<Scalar> + 1), data(pieces[0].values) {}
};

template <class Element>
void summarize(const Call& call) {
  typedef decltype(convert(Element{})) Scalar;
  constexpr int64_t LANES = WIDE * WIDTH<Scalar>;
  const int64_t group = call.heads / call.key_heads;
  // The strips of one (batch, key head): the heads of a group side by side, as they end alike.
  const int64_t strips = (call.queries + LANES - 1) / LANES * group;
  const int64_t pairs = call.batch * call.key_heads;
  int64_t together = MOST_STRIPS;
  while (together > 1 && pairs * strips < 4 * together * call.threads) together /= 2;
  const int64_t tasks_of_pair = (strips + together - 1) / together, tasks = pairs * tasks_of_pair;
  const MaskReader<Scalar> read = mask_reader<Scalar>(call.mask_type);
  std::vector<Row> rows(pairs * strips);
  const double products =
      double(call.batch * call.heads) * call.queries * call.keys * call.channels;
  const bool is_shared = call.threads > 1 && tasks > 1 && products > 1e6;  // waking them takes long

#pragma omp parallel num_threads(call.threads) if (is_shared)
  {
    Buffer<Scalar> queries(together * LANES * call.channels), keys(BLOCK * call.channels);
    Buffer<Scalar> logits(BLOCK * LANES), added(BLOCK * LANES);
    std::vector<Strip<Scalar>> own(together);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t pair = task % pairs, batch = pair / call.key_heads;
      const int64_t key_head = pair % call.key_heads;
      const int64_t last = strips - task / pairs * together;  // those that see most keys go first
      const int64_t first = last > together ? last - together : 0;
      int64_t end = 0;
      for (int64_t index = first; index < last; index++) {
        Strip<Scalar>& strip = own[index - first];
        begin<Element>(call, batch, key_head * group + index % group, index / group * LANES,
                       queries.data + (index - first) * LANES * call.channels, strip);
        if (strip.end > end) end = strip.end;
      }
      const Element* from = reinterpret_cast<const Element*>(call.key) +
                            batch * call.key_strides[0] + key_head * call.key_strides[1];
      for (int64_t start = 0; start < end; start += BLOCK) {
        const int64_t packed = end - start < BLOCK ? end - start : BLOCK;
        pack_keys<Element, Scalar>(call, from + start * call.key_strides[2], packed, keys.data);
        for (int64_t index = 0; index < last - first; index++) {
          Strip<Scalar>& strip = own[index];
          const int64_t seen = strip.end - start < BLOCK ? strip.end - start : BLOCK;
          if (seen <= 0) continue;
          if (read && !read(call, batch, strip, start, seen, added.data)) continue;
          const Scalar* addend = read ? added.data : nullptr;
          if (strip.vectors == NARROW)
            meet_keys<Scalar, NARROW>(call, strip, keys.data, start, seen, addend, logits.data);
          else
            meet_keys<Scalar, WIDE>(call, strip, keys.data, start, seen, addend, logits.data);
        }
      }
      for (int64_t index = first; index < last; index++)
        rows[pair * strips + index] = finish(call, own[index - first]);
    }
  }
  for (int64_t head = 0; head < call.heads; head++) {
    Row total;  // in one order, so that threads make no difference
    for (int64_t batch = 0; batch < call.batch; batch++)
      for (int64_t index = head % group; index < strips; index += group)
        merge(total, rows[(batch * call.key_heads + head / group) * strips + index]);
    std::memcpy(call.result + head * (sizeof(Row) / sizeof(double)), &total, sizeof(total));
  }
}

}  // namespace

#define TMM_SUMMARIZE(NAME, ELEMENT) \
  extern "C" void NAME(const Call* call) { summarize<ELEMENT>(*call); }

TMM_SUMMARIZE(summarize_float64, double)
TMM_SUMMARIZE(summarize_float32, float)
TMM_SUMMARIZE(summarize_float16, Float16)
TMM_SUMMARIZE(summarize_bfloat16, BFloat16)
