// Statistics of scaled-dot-product attention per head, on a CPU, without the matrix of logits.
//
// Queries are cut into strips of a few vectors, one query to a lane, so that every step of the
// softmax runs down the lanes and nothing is reduced across a vector. A thread takes a few strips
// that read the same keys and meets the keys block by block: each block is converted once,
// multiplied with every strip, and joined into the running maximum, sum of exponentials and sum of
// exponential times logit. A causal vector meets no key behind its last query. Compiled together
// with vectors.cpp.

#include <memory>
#include <utility>
#include <vector>

namespace {

constexpr int WIDE = BYTES == 32 ? 2 : 4;  // vectors in a strip; AVX2 has few registers
constexpr int BLOCK = 96;       // keys: their logits with a strip stay in the first-level cache
constexpr int MOST_KEYS = 12;   // that are multiplied at a time, beginning anywhere in a block
constexpr int ROOM = BLOCK + MOST_KEYS;
constexpr int MOST_STRIPS = 8;  // that a thread takes at a time, fewer where threads are many

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

float convert(bool allowed) {  // of a mask
  const float values[] = {-std::numeric_limits<float>::infinity(), 0};  // nothing predicts a mask
  return values[allowed];
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
using Mask = decltype(Vector<Scalar>{} == Vector<Scalar>{});  // -1 where it holds
template <class Scalar>
using Index = std::conditional_t<sizeof(Scalar) == 8, int64_t, int32_t>;  // of which that consists

template <class Scalar>
constexpr Scalar INFINITE = std::numeric_limits<Scalar>::infinity();

template <class Scalar>
void store(Scalar* to, Vector<Scalar> values) {
  std::memcpy(to, &values, sizeof(values));
}

// Deviations from the maximum are raised to this, whose exponential is 0 exactly. A variable, since
// GCC compares with a constant and blends, instead of taking the larger of both.
template <class Scalar>
const volatile Scalar LOWEST = sizeof(Scalar) == 8 ? -750 : -88;

template <class Scalar>
Vector<Scalar> larger(Vector<Scalar> one, Vector<Scalar> other) {
  return one > other ? one : other;  // the other where one of them is NaN
}

// Of values from LOWEST to 0, within 2 units in the last place near 0 and 5 at LOWEST; NaN of NaN.
Vector<float> exponential(Vector<float> x) {
  constexpr float ROUND = (3 << 22) + 127;  // adding it leaves no fraction, but a float's exponent
  constexpr float LOG_2 = 0.693147181f;     // by luck 16 times closer than half a unit
  const Vector<float> rounded = x * 1.44269504f + ROUND, power = rounded - ROUND;
  const Vector<float> rest = x - power * LOG_2;
  // The polynomial of least relative error up to log(2) / 2, with 1 at 0.
  Vector<float> result = rest * 0.008290272206068039f + 0.04189816117286682f;
  result = result * rest + 0.1666763871908188f;
  result = result * rest + 0.4999914765357971f;
  result = result * rest + 0.9999997019767761f;
  result = result * rest + 1.0f;
  Vector<uint32_t> bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits <<= 23;
  Vector<float> two_to_power;  // 0 at LOWEST
  std::memcpy(&two_to_power, &bits, sizeof(bits));
  return result * two_to_power;
}

Vector<double> exponential(Vector<double> x) {
  for (int lane = 0; lane < WIDTH<double>; lane++) x[lane] = std::exp(x[lane]);
  return x;
}

// Of finite positive values that are not subnormal; the polynomial is that of FreeBSD's logf.
Vector<float> logarithm(Vector<float> x) {
  constexpr int32_t ROOT_OF_HALF = 0x3f3504f3;
  constexpr float LOG_2 = 0.693147181f;
  Mask<float> bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Mask<float> power = (bits - ROOT_OF_HALF) >> 23;
  bits -= power << 23;
  std::memcpy(&x, &bits, sizeof(bits));
  const Vector<float> rest = x - 1.0f, ratio = rest / (rest + 2.0f), square = ratio * ratio;
  const Vector<float> half = rest * rest * 0.5f;
  Vector<float> result = square * 0.24279078841f + 0.28498786688f;
  result = result * square + 0.40000972152f;
  result = result * square + 0.66666662693f;
  result = ratio * (half + result * square) - half + rest;
  return result + __builtin_convertvector(power, Vector<float>) * LOG_2;
}

Vector<double> logarithm(Vector<double> x) {
  for (int lane = 0; lane < WIDTH<double>; lane++) x[lane] = std::log(x[lane]);
  return x;
}

// What Python passes, except for where tensors lie; strides count elements, over (batch, head, row,
// column).
struct Geometry {
  int64_t query_strides[4], key_strides[4], mask_strides[4];
  int64_t batch, heads, key_heads, queries, keys, channels;
  int64_t mask_type;   // see `mask_reader`
  int64_t query_step;  // distance of the measured queries in the sequence
  int64_t is_causal;
  int64_t threads;
  double scale;
};

struct Call : Geometry {
  const char *query, *key, *mask;
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
  int64_t end;                   // keys that any of them sees
  int vectors;
  Scalar* packed;      // (vectors, channels, lanes)
  int64_t ends[WIDE];  // keys that any query of a vector sees
  Vector<Scalar> maximum[WIDE], total[WIDE], weighted[WIDE], sink[WIDE];
  Mask<Scalar> positions[WIDE], allowed[WIDE];  // `allowed` counts keys, only where a mask says it
};

// Rows of elements side by side, converted; Inductor's flags keep the compiler from making vectors
// of a loop.
template <class Element, class Scalar>
void pack(const Element* from, int64_t row_step, int64_t step, int64_t rows, int64_t size,
          Scalar* to) {
  constexpr bool IS_SHORT = std::is_same_v<Element, BFloat16> || std::is_same_v<Element, Float16>;
  constexpr bool IS_WIDE =
      std::is_same_v<Element, Scalar> || (IS_SHORT && std::is_same_v<Scalar, float>);
  for (int64_t row = 0; row < rows; row++, from += row_step, to += size) {
    int64_t index = 0;
    if constexpr (IS_WIDE)
      for (; step == 1 && index + WIDTH<Scalar> <= size; index += WIDTH<Scalar>)
        store(to + index, load(from + index));
    for (; index < size; index++) to[index] = convert(from[index * step]);
  }
}

// The elements of two vectors in turns, in two vectors.
template <class Scalar, int... LANE>
void interleave(Vector<Scalar> one, Vector<Scalar> other, Vector<Scalar>* to,
                std::integer_sequence<int, LANE...>) {
  constexpr int SIZE = sizeof...(LANE), HALF = SIZE / 2;
#ifdef __clang__
  to[0] = __builtin_shufflevector(one, other, (LANE / 2 + LANE % 2 * SIZE)...);
  to[1] = __builtin_shufflevector(one, other, (LANE / 2 + LANE % 2 * SIZE + HALF)...);
#else
  to[0] = __builtin_shuffle(one, other, Mask<Scalar>{(LANE / 2 + LANE % 2 * SIZE)...});
  to[1] = __builtin_shuffle(one, other, Mask<Scalar>{(LANE / 2 + LANE % 2 * SIZE + HALF)...});
#endif
}

// Rows of channels, as many as a vector has lanes, as (channels, lanes).
template <class Scalar>
void transpose(const Scalar* rows, int64_t channels, Scalar* to) {
  constexpr int SIZE = WIDTH<Scalar>;
  int64_t channel = 0;
  for (; channel + SIZE <= channels; channel += SIZE) {
    Vector<Scalar> tile[SIZE], next[SIZE];
    for (int row = 0; row < SIZE; row++) tile[row] = load(rows + row * channels + channel);
    for (int distance = 1; distance < SIZE; distance *= 2) {
      for (int row = 0; row < SIZE / 2; row++)
        interleave<Scalar>(tile[row], tile[row + SIZE / 2], next + 2 * row,
                           std::make_integer_sequence<int, SIZE>{});
      for (int row = 0; row < SIZE; row++) tile[row] = next[row];
    }
    for (int row = 0; row < SIZE; row++) store(to + (channel + row) * SIZE, tile[row]);
  }
  for (; channel < channels; channel++)
    for (int row = 0; row < SIZE; row++) to[channel * SIZE + row] = rows[row * channels + channel];
}

// Begin with the strip of some queries of a head; `packed` is where they are to lie, by way of
// `rows`.
template <class Element, class Scalar>
void begin(const Call& call, int64_t batch, int64_t head, int64_t first, Scalar* rows,
           Scalar* packed, Strip<Scalar>& strip) {
  constexpr int64_t SIZE = WIDTH<Scalar>, LANES = WIDE * SIZE;
  const int64_t remaining = call.queries - first, channels = call.channels;
  strip.head = head;
  strip.first = first;
  strip.queries = remaining < LANES ? remaining : LANES;
  strip.vectors = (strip.queries + SIZE - 1) / SIZE;
  strip.packed = packed;

  const int64_t* strides = call.query_strides;
  const Element* from = reinterpret_cast<const Element*>(call.query) + batch * strides[0] +
                        head * strides[1] + first * strides[2];
  pack(from, strides[2], strides[3], strip.queries, channels, rows);
  const int64_t missing = strip.vectors * SIZE - strip.queries;
  std::memset(rows + strip.queries * channels, 0, missing * channels * sizeof(Scalar));
  for (int vector = 0; vector < strip.vectors; vector++) {
    const int64_t offset = vector * SIZE * channels, next = first + (vector + 1) * SIZE;
    transpose(rows + offset, channels, packed + offset);
    const int64_t last = (next < call.queries ? next : call.queries) - 1;
    const int64_t seen = last * call.query_step + 1;
    strip.ends[vector] = call.is_causal && seen < call.keys ? seen : call.keys;
    strip.end = strip.ends[vector];
    strip.maximum[vector] = strip.sink[vector] = Vector<Scalar>{} - INFINITE<Scalar>;
    strip.total[vector] = strip.weighted[vector] = Vector<Scalar>{};
    strip.allowed[vector] = Mask<Scalar>{};
    for (int lane = 0; lane < SIZE; lane++)
      strip.positions[vector][lane] = (first + vector * SIZE + lane) * call.query_step;
  }
}

// Scaled products of some vectors of queries with some keys, as (VECTORS, ROOM, lanes).
template <class Scalar, int VECTORS, int KEYS>
void multiply(const Scalar* queries, const Scalar* keys, int64_t channels, Scalar scale,
              Scalar* logits) {
  constexpr int SIZE = WIDTH<Scalar>;
  Vector<Scalar> sums[KEYS][VECTORS] = {};
  for (int64_t channel = 0; channel < channels; channel++) {
    Vector<Scalar> query[VECTORS];
    for (int vector = 0; vector < VECTORS; vector++)
      query[vector] = load(queries + (vector * channels + channel) * SIZE);
    for (int key = 0; key < KEYS; key++) {
      const Scalar factor = keys[key * channels + channel];
      for (int vector = 0; vector < VECTORS; vector++) sums[key][vector] += query[vector] * factor;
    }
  }
  for (int key = 0; key < KEYS; key++)
    for (int vector = 0; vector < VECTORS; vector++)
      store(logits + (vector * ROOM + key) * SIZE, sums[key][vector] * scale);
}

// Multiply the last `vectors` of a strip, at most VECTORS, with the keys from `key` on that each
// of them sees; none sees fewer than the one before.
template <class Scalar, int VECTORS>
void multiply_seen(int vectors, const Scalar* queries, const Scalar* keys, int64_t key,
                   const int64_t* seen, int64_t channels, Scalar scale, Scalar* logits) {
  constexpr int KEYS = VECTORS == 1 ? MOST_KEYS : 6, SIZE = WIDTH<Scalar>;
  if (vectors == VECTORS) {
    for (; key < *seen; key += KEYS)
      multiply<Scalar, VECTORS, KEYS>(queries, keys + key * channels, channels, scale,
                                      logits + key * SIZE);
    vectors--;
    seen++;
    queries += channels * SIZE;
    logits += ROOM * SIZE;
  }
  if constexpr (VECTORS > 1)
    multiply_seen<Scalar, VECTORS - 1>(vectors, queries, keys, key, seen, channels, scale, logits);
}

// Read the mask of a strip and some keys as what is added to logits, (vectors, ROOM, lanes), minus
// infinity where it forbids a key. Returns whether it allows any.
template <class Scalar>
using MaskReader = bool (*)(const Call&, int64_t batch, const Strip<Scalar>&, int64_t start,
                            int64_t keys, Scalar* added);

template <class Scalar, class Element>
bool read_mask(const Call& call, int64_t batch, const Strip<Scalar>& strip, int64_t start,
               int64_t keys, Scalar* added) {
  constexpr int64_t SIZE = WIDTH<Scalar>;
  // As `forbidden_up_to` in attention.py.
  constexpr int LIMIT = std::is_same_v<Element, BFloat16> ? -9984 : -9999;
  const Vector<Scalar> forbidden = Vector<Scalar>{} - INFINITE<Scalar>;
  const int64_t* strides = call.mask_strides;
  const Element* from = reinterpret_cast<const Element*>(call.mask) + batch * strides[0] +
                        strip.head * strides[1] + strip.first * strides[2] + start * strides[3];
  alignas(BYTES) Scalar rows[SIZE * BLOCK];
  Mask<Scalar> any = {};
  for (int vector = 0; vector < strip.vectors; vector++, added += ROOM * SIZE) {
    const bool are_equal = strides[2] == 0;  // such rows are read once
    if (vector == 0 || !are_equal) {
      const int64_t rest = strip.queries - vector * SIZE, filled = rest < SIZE ? rest : SIZE;
      pack(from + vector * SIZE * strides[2], strides[2], strides[3], are_equal ? 1 : filled, keys,
           rows);
      for (int64_t index = filled * keys; index < SIZE * keys; index++) rows[index] = forbidden[0];
    }
    if (!are_equal) transpose(rows, keys, added);
    for (int64_t key = 0; key < keys; key++) {
      const Vector<Scalar> row = Vector<Scalar>{} + rows[key];
      Vector<Scalar> values = are_equal ? row : load(added + key * SIZE);
      values = values <= LIMIT ? forbidden : values;  // NaN stays
      any |= values != forbidden;
      store(added + key * SIZE, values);
    }
  }
  for (int lane = 0; lane < SIZE; lane++)
    if (any[lane]) return true;
  return false;
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

// Put minus infinity in place of the logits of a vector from key `from` on that are not allowed.
template <class Scalar>
void forbid(Strip<Scalar>& strip, int vector, int64_t start, int64_t from, int64_t keys,
            bool is_causal, const Scalar* added, Scalar* logits) {
  const Vector<Scalar> forbidden = Vector<Scalar>{} - INFINITE<Scalar>;
  for (int64_t key = from; key < keys; key++) {
    const int64_t offset = key * WIDTH<Scalar>;
    Vector<Scalar> values = load(logits + offset);
    Mask<Scalar> allowed = Mask<Scalar>{} - 1;
    const auto index = Index<Scalar>(start + key);
    if (is_causal) allowed &= strip.positions[vector] >= Mask<Scalar>{} + index;
    if (added) {
      const Vector<Scalar> addend = load(added + offset);
      allowed &= addend != forbidden;
      values += addend;
      strip.allowed[vector] -= allowed;
    }
    store(logits + offset, allowed ? values : forbidden);
  }
}

// Join logits of a vector into its running sums.
template <class Scalar>
void accumulate(Strip<Scalar>& strip, int vector, const Scalar* logits, int64_t keys) {
  constexpr int64_t SIZE = WIDTH<Scalar>;
  const Vector<Scalar> before = strip.maximum[vector];
  const Vector<Scalar> none = Vector<Scalar>{} - INFINITE<Scalar>;
  const Vector<Scalar> lowest = Vector<Scalar>{} + LOWEST<Scalar>;
  Vector<Scalar> maximum = before, second = before;  // two, so that one waits less for the other
  int64_t key = 0;
  for (; key + 1 < keys; key += 2) {
    maximum = larger<Scalar>(load(logits + key * SIZE), maximum);
    second = larger<Scalar>(load(logits + (key + 1) * SIZE), second);
  }
  if (key < keys) maximum = larger<Scalar>(load(logits + key * SIZE), maximum);
  maximum = larger<Scalar>(second, maximum);
  const Vector<Scalar> centre = maximum == none ? Vector<Scalar>{} : maximum;
  Vector<Scalar> total = {}, weighted = {};
  for (key = 0; key < keys; key++) {
    const Vector<Scalar> exponent = larger<Scalar>(lowest, load(logits + key * SIZE) - centre);
    const Vector<Scalar> term = exponential(exponent);
    total += term;
    weighted += term * exponent;
  }
  const Vector<Scalar> change = larger<Scalar>(lowest, before - centre);
  const Vector<Scalar> factor = exponential(change);
  strip.weighted[vector] =
      factor * (strip.weighted[vector] + change * strip.total[vector]) + weighted;
  strip.total[vector] = factor * strip.total[vector] + total;
  strip.maximum[vector] = maximum;
}

template <class Scalar>
void meet_keys(const Call& call, Strip<Scalar>& strip, const Scalar* packed, int64_t start,
               int64_t keys, const Scalar* added, Scalar* logits) {
  constexpr int64_t SIZE = WIDTH<Scalar>;
  int64_t seen[WIDE];
  for (int vector = 0; vector < strip.vectors; vector++) {
    const int64_t rest = strip.ends[vector] - start;
    seen[vector] = rest < 0 ? 0 : rest < keys ? rest : keys;
  }
  multiply_seen<Scalar, WIDE>(strip.vectors, strip.packed, packed, 0, seen, call.channels,
                              call.scale, logits);
  for (int vector = 0; vector < strip.vectors; vector++, logits += ROOM * SIZE) {
    if (seen[vector] == 0) continue;
    // Its first query sees the keys up to its own position, the others more.
    const int64_t all_see = strip.positions[vector][0] + 1 - start;
    const bool is_causal = call.is_causal && all_see < seen[vector];
    if (is_causal || added) {
      const int64_t from = added || all_see < 0 ? 0 : all_see;
      const Scalar* addend = added ? added + vector * ROOM * SIZE : nullptr;
      forbid(strip, vector, start, from, seen[vector], is_causal, addend, logits);
    }
    if (start == 0) strip.sink[vector] = load(logits);
    accumulate(strip, vector, logits, seen[vector]);
  }
}

template <class Scalar>
Row finish(const Call& call, const Strip<Scalar>& strip) {
  typedef Vector<Scalar> Values;
  const Values undefined = Values{} + std::numeric_limits<Scalar>::quiet_NaN();
  const Values lowest = Values{} + LOWEST<Scalar>;
  Row row;
  for (int vector = 0; vector < strip.vectors; vector++) {
    const Mask<Scalar> keys = Mask<Scalar>{} + Index<Scalar>(call.keys);
    const Mask<Scalar> seen = strip.positions[vector] + 1;
    Mask<Scalar> allowed = call.is_causal ? (seen < keys ? seen : keys) : keys;
    if (call.mask_type) allowed = strip.allowed[vector];

    // A logit is NaN or infinite, or none is finite.
    const Mask<Scalar> valid = strip.total[vector] > 0;
    const Values logarithm_of_total = valid ? logarithm(strip.total[vector]) : undefined;
    const Values maximum = valid ? strip.maximum[vector] : undefined;
    const Values probability = 1 / (valid ? strip.total[vector] : undefined);
    Values entropy = logarithm_of_total - strip.weighted[vector] * probability;
    entropy = entropy < 0 ? Values{} : entropy;
    const Values largest = logarithm(__builtin_convertvector(allowed, Values));
    const Values normalized = allowed > 1 ? entropy / largest : entropy;
    const Values logsumexp = maximum + logarithm_of_total;
    const Values sink = larger<Scalar>(lowest, strip.sink[vector] - maximum);
    const Values sink_mass = exponential(sink) * probability;
    const int64_t rest = strip.queries - vector * WIDTH<Scalar>;
    for (int lane = 0; lane < WIDTH<Scalar> && lane < rest; lane++)
      if (allowed[lane])
        merge(row, {1, entropy[lane], normalized[lane], logsumexp[lane], probability[lane],
                    sink_mass[lane], maximum[lane]});
  }
  return row;
}

// Scratch memory of a thread, aligned to vectors.
template <class Scalar>
struct Buffer {
  struct alignas(BYTES) Piece {
    Scalar values[WIDTH<Scalar>];
  };
  std::unique_ptr<Piece[]> pieces;
  Scalar* data;
  explicit Buffer(int64_t size)
      : pieces(new Piece[size / WIDTH<Scalar> + 1]), data(pieces[0].values) {}
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
    Buffer<Scalar> queries(together * LANES * call.channels), keys(ROOM * call.channels);
    Buffer<Scalar> logits(ROOM * LANES), added(read ? ROOM * LANES : 0);
    static_assert(LANES <= ROOM, "queries are packed where keys lie later");
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
                       keys.data, queries.data + (index - first) * LANES * call.channels, strip);
        if (strip.end > end) end = strip.end;
      }
      const Element* from = reinterpret_cast<const Element*>(call.key) +
                            batch * call.key_strides[0] + key_head * call.key_strides[1];
      for (int64_t start = 0; start < end; start += BLOCK) {
        const int64_t packed = end - start < BLOCK ? end - start : BLOCK;
        pack(from + start * call.key_strides[2], call.key_strides[2], call.key_strides[3], packed,
             call.channels, keys.data);
        for (int64_t index = 0; index < last - first; index++) {
          Strip<Scalar>& strip = own[index];
          const int64_t seen = strip.end - start < BLOCK ? strip.end - start : BLOCK;
          if (seen <= 0) continue;
          if (read && !read(call, batch, strip, start, seen, added.data)) continue;
          const Scalar* addend = read ? added.data : nullptr;
          meet_keys(call, strip, keys.data, start, seen, addend, logits.data);
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

#define TMM_SUMMARIZE(NAME, ELEMENT)                                                    \
  extern "C" void NAME(const Geometry* geometry, const char* query, const char* key,    \
                       const char* mask, double* result) {                              \
    summarize<ELEMENT>({*geometry, query, key, mask, result});                          \
  }

TMM_SUMMARIZE(summarize_float64, double)
TMM_SUMMARIZE(summarize_float32, float)
TMM_SUMMARIZE(summarize_float16, Float16)
TMM_SUMMARIZE(summarize_bfloat16, BFloat16)
