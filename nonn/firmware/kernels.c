/* The sums are exact, so their order is free. What follows them is that of ONNX Runtime: one multiplication in
 * float32, rounded half to even. So answers have the same bits, which a test checks. */
#include "kernels.h"

#include <string.h>

/* Four sums, of two filters over two columns of `size` values: 16 products for 4 loads, 8 extensions and 8 SMLAD.
 * Both SXTB16 and UXTB16 take bytes 0 and 2, or 1 and 3, so the pairs match without any reordering. The layout follows
 * CMSIS-NN, https://arxiv.org/abs/1801.06601, but extends bytes here and not in the columns, which halves those. */
#ifdef __ARM_FEATURE_DSP
#define EXTEND(kind, low, high, word) \
  __asm__(#kind " %0, %1" : "=r"(low) : "r"(word)); \
  __asm__(#kind " %0, %1, ror #8" : "=r"(high) : "r"(word))
#define ADD_PRODUCTS(sum, a, b) __asm__("smlad %0, %1, %2, %0" : "+r"(sum) : "r"(a), "r"(b))

typedef uint32_t __attribute__((may_alias)) word_t; /* four bytes that are read at once */

static inline void block(const int8_t *weights, const uint8_t *first, const uint8_t *second, int size, int32_t *sums) {
  const word_t *w = (const word_t *)weights, *p = (const word_t *)first, *q = (const word_t *)second;
  const word_t *end = p + size / 4;
  int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  while (p != end) {
    uint32_t word, p0, p1, q0, q1, w0, w1;
    word = *p++;
    EXTEND(uxtb16, p0, p1, word);
    word = *q++;
    EXTEND(uxtb16, q0, q1, word);
    word = *w++;
    EXTEND(sxtb16, w0, w1, word);
    ADD_PRODUCTS(s0, w0, p0);
    ADD_PRODUCTS(s2, w0, q0);
    ADD_PRODUCTS(s0, w1, p1);
    ADD_PRODUCTS(s2, w1, q1);
    word = *w++;
    EXTEND(sxtb16, w0, w1, word);
    ADD_PRODUCTS(s1, w0, p0);
    ADD_PRODUCTS(s3, w0, q0);
    ADD_PRODUCTS(s1, w1, p1);
    ADD_PRODUCTS(s3, w1, q1);
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

/* Rounds as FPSCR says, which is half to even after a reset. */
static inline int32_t rounded(float value) {
  float integer;
  int32_t result;
  __asm__("vcvtr.s32.f32 %0, %1" : "=t"(integer) : "t"(value));
  memcpy(&result, &integer, sizeof result);
  return result;
}
#else
#include <math.h>

static inline void block(const int8_t *weights, const uint8_t *first, const uint8_t *second, int size, int32_t *sums) {
  for (int k = 0; k < size; k++) {
    const int8_t *w = weights + k / 4 * 8 + k % 4;
    sums[0] += w[0] * first[k];
    sums[1] += w[4] * first[k];
    sums[2] += w[0] * second[k];
    sums[3] += w[4] * second[k];
  }
}

static inline int32_t rounded(float value) { return (int32_t)nearbyintf(value); }
#endif

static inline uint8_t requantised(const nonn_conv_t *conv, const uint8_t *table, int32_t sum, int filter) {
  int32_t value = rounded((float)sum * conv->scale[filter]) + conv->out_zero;
  value = value < 0 ? 0 : value > 255 ? 255 : value;
  return table ? table[filter * conv->table_step + value] : (uint8_t)value;
}

static int filled_up(int size) { return (size + 3) & ~3; }

/* The values under the kernel at one output pixel, in the order (row, column, channel). */
static void gather(const nonn_conv_t *conv, const uint8_t *in, int y, int x, uint8_t *column) {
  const int width = conv->kernel_columns * conv->channels;
  const int left = x * conv->stride - conv->left;
  const int before = left < 0 ? -left : 0;
  const int beyond = left + conv->kernel_columns - conv->columns;
  const int after = beyond > 0 ? beyond : 0;
  for (int row = y * conv->stride - conv->top, i = 0; i < conv->kernel_rows; i++, row++, column += width) {
    if (row < 0 || row >= conv->rows) {
      memset(column, conv->in_zero, width);
      continue;
    }
    const int skip = before * conv->channels, rest = after * conv->channels;
    if (skip) memset(column, conv->in_zero, skip);
    memcpy(column + skip, in + (row * conv->columns + left + before) * conv->channels, width - skip - rest);
    if (rest) memset(column + width - rest, conv->in_zero, rest);
  }
}

static int is_pointwise(const nonn_conv_t *conv) {
  return conv->kernel_rows == 1 && conv->kernel_columns == 1 && conv->stride == 1 && !conv->top && !conv->left &&
         conv->channels % 4 == 0;
}

static void one_row(const nonn_conv_t *conv, const uint8_t *in, uint8_t *out, uint8_t *columns, int y) {
  const int size = filled_up(conv->kernel_rows * conv->kernel_columns * conv->channels);
  const int pointwise = is_pointwise(conv);
  const uint8_t *const table = conv->pool == 1 ? conv->table : NULL;
  for (int x = 0; x < conv->out_columns; x += 2) {
    const int both = x + 1 < conv->out_columns;
    const uint8_t *first = in + (y * conv->columns + x) * conv->channels, *second = first + conv->channels;
    if (!pointwise) {
      gather(conv, in, y, x, columns);
      if (both) gather(conv, in, y, x + 1, columns + size);
      first = columns, second = columns + size;
    }
    if (!both) second = first;
    const int8_t *weights = conv->weights;
    uint8_t *a = out + x * conv->filters, *b = both ? a + conv->filters : a; /* of one pixel, written twice */
    for (int f = 0; f < conv->filters; f += 2, weights += 2 * size) {
      int32_t sums[4] = {conv->bias[f], conv->bias[f + 1], conv->bias[f], conv->bias[f + 1]};
      block(weights, first, second, size, sums);
      a[f] = requantised(conv, table, sums[0], f);
      a[f + 1] = requantised(conv, table, sums[1], f + 1);
      b[f] = requantised(conv, table, sums[2], f);
      b[f + 1] = requantised(conv, table, sums[3], f + 1);
    }
  }
}

/* The largest of each window of `pool` rows, then the table. */
static void pool_rows(const nonn_conv_t *conv, const uint8_t *rows, uint8_t *out) {
  const int filters = conv->filters, pool = conv->pool;
  for (int x = 0; x + pool <= conv->out_columns; x += pool) {
    for (int f = 0; f < filters; f++) {
      uint8_t largest = 0;
      for (int i = 0; i < pool; i++) {
        for (int j = 0; j < pool; j++) {
          const uint8_t value = rows[(i * conv->out_columns + x + j) * filters + f];
          if (value > largest) largest = value;
        }
      }
      *out++ = conv->table ? conv->table[f * conv->table_step + largest] : largest;
    }
  }
}

void nonn_conv(const nonn_conv_t *conv, const uint8_t *in, uint8_t *out, uint8_t *scratch) {
  const int row = conv->out_columns * conv->filters;
  if (conv->pool == 1) {
    for (int y = 0; y < conv->out_rows; y++) one_row(conv, in, out + y * row, scratch, y);
    return;
  }
  const int size = filled_up(conv->kernel_rows * conv->kernel_columns * conv->channels);
  uint8_t *const rows = scratch + (is_pointwise(conv) ? 0 : 2 * size);
  for (int y = 0; y + conv->pool <= conv->out_rows; y += conv->pool) {
    for (int i = 0; i < conv->pool; i++) one_row(conv, in, rows + i * row, scratch, y + i);
    pool_rows(conv, rows, out);
    out += conv->out_columns / conv->pool * conv->filters;
  }
}

void nonn_prepare(const uint8_t *image, uint8_t *out, const uint8_t *tables, int channels, int rows, int columns,
                  int mirror) {
  for (int c = 0; c < channels; c++) {
    for (int y = 0; y < rows; y++) {
      for (int x = 0; x < columns; x++) {
        const uint8_t value = image[(c * rows + y) * columns + (mirror ? columns - 1 - x : x)];
        out[(y * columns + x) * channels + c] = tables[256 * c + value];
      }
    }
  }
}

/* Eigen's sum of a vector, which ONNX Runtime calls: from the first aligned value on, two vectors of 4 lanes in turn,
 * added up, then lanes 0 and 2, 1 and 3, then both, then the values before and after one by one. `offset` counts the values
 * in front of the first one, which lie in one block of memory that is aligned. */
static float sum_as_eigen(const uint8_t *in, const float *table, int pixels, int step, int offset) {
  const int start = -offset & 3;
  const int left = pixels > start ? pixels - start : 0;
  const int end = start + (left & ~3), end_of_pairs = start + (left & ~7);
  float lanes[8];
  if (left < 4) {
    float sum = table[in[0]];
    for (int i = 1; i < pixels; i++) sum += table[in[i * step]];
    return sum;
  }
  for (int i = 0; i < 4; i++) lanes[i] = table[in[(start + i) * step]];
  if (left >= 8) {
    for (int i = 4; i < 8; i++) lanes[i] = table[in[(start + i) * step]];
    for (int i = 8; i < end_of_pairs - start; i++) lanes[i % 8] += table[in[(start + i) * step]];
    for (int i = 0; i < 4; i++) lanes[i] += lanes[i + 4];
    for (int i = end_of_pairs; i < end; i++) lanes[i - end_of_pairs] += table[in[i * step]];
  }
  float sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  for (int i = 0; i < start; i++) sum += table[in[i * step]];
  for (int i = end; i < pixels; i++) sum += table[in[i * step]];
  return sum;
}

void nonn_mean(const uint8_t *in, float *out, const float *table, int pixels, int channels) {
  for (int c = 0; c < channels; c++) {
    out[c] = sum_as_eigen(in + c, table, pixels, channels, c * pixels) / (float)pixels;
  }
}
