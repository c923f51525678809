/* Kernels of int8 students: unsigned 8-bit maps in NHWC order, signed 8-bit weights, 32-bit sums. */
#ifndef NONN_KERNELS_H
#define NONN_KERNELS_H

#include <stdint.h>

/* A convolution, with all that follows it up to the next map of integers.
 *
 * weights: for each two filters, 4 weights of the first, 4 of the second, the next 4 of the first, and so on, in the
 * order (row, column, channel) and filled up with zeros. bias: with the input's zero point folded in. scale: input
 * scale times filter scale over output scale. table: what follows value by value, or NULL: 256 entries, the same for
 * all filters (table_step 0), or as many for each (table_step 256). */
typedef struct {
  const int8_t *weights;
  const int32_t *bias;
  const float *scale;
  const uint8_t *table;
  uint16_t table_step;
  uint16_t rows, columns, channels;        /* of the input */
  uint16_t out_rows, out_columns, filters; /* before pooling; filters are even */
  uint8_t kernel_rows, kernel_columns, stride, top, left;
  uint8_t pool; /* side of the windows of the maximum pooling that follows; 1 for none */
  uint8_t in_zero, out_zero;
} nonn_conv_t;

/* scratch: two columns of the kernel's values, each filled up to 4, unless the convolution is pointwise; then `pool`
 * rows of the output if it pools. Aligned to 4 bytes, as all maps. */
void nonn_conv(const nonn_conv_t *conv, const uint8_t *in, uint8_t *out, uint8_t *scratch);

/* An image in planes to a map; tables: 256 entries for each channel. mirror: 1 to swap left and right. */
void nonn_prepare(const uint8_t *image, uint8_t *out, const uint8_t *tables, int channels, int rows, int columns,
                  int mirror);

/* Means over all pixels of table[value], summed in the order of ONNX Runtime on processors of 4-lane vectors. */
void nonn_mean(const uint8_t *in, float *out, const float *table, int pixels, int channels);

#endif
