/* Product quantiser: one byte a chunk of consecutive dimensions, 256 centroids a chunk.
 * Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011.
 * Behind quantiser.h; used directly by opq alone. */
#ifndef ANND_INDEX_PQ_H
#define ANND_INDEX_PQ_H

#include "index/code_methods.h"

#define PQ_CENTROIDS CODE_VALUES

extern const struct code_methods pq_methods;

/* Chunk c covers dimensions pq_chunk_begin(c) to pq_chunk_begin(c + 1): all of dim / chunk_count
 * dimensions, the first dim % chunk_count one longer. */
uint32_t pq_chunk_begin(uint32_t dim, uint32_t chunk_count, uint32_t chunk);

#endif
