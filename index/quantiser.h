/* Quantiser: compresses vectors to code_bytes bytes each and estimates distances on the codes.
 *
 * One interface over the codes annd knows:
 *   pq      one byte a chunk of consecutive dimensions, 256 centroids each
 *           (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", 2011)
 *   opq     rotation by PCA with balanced allocation of variance to chunks, then pq
 *           (Ge, He, Ke, Sun, "Optimized Product Quantization", 2013, the parametric solution)
 *   scalar  4 or 8 bits a dimension between the sample's quantiles
 * The vectors a quantiser sees are the ones distances are taken of: for cosine on floats they are
 * normalised by the caller. Immutable once trained; any number of threads may share it. */
#ifndef ANND_INDEX_QUANTISER_H
#define ANND_INDEX_QUANTISER_H

#include <stddef.h>
#include <stdint.h>

#include "index/element.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

enum code_kind { CODE_AUTO = 0, CODE_PQ = 1, CODE_OPQ = 2, CODE_SCALAR = 3 }; /* values on disk */

struct quantiser;

/* sample: count x dim floats, row-major, borrowed. CODE_AUTO trains pq and opq (and scalar where
 * code_bytes allows 4 bits a dimension) and keeps the one with the least mean squared error on the
 * sample's second half. Same bytes for any pool. ERR_INVALID: count < 256, code_bytes outside
 * 1..dim (scalar: needs dim/2 or dim, rounded up), CODE_SCALAR with too few bytes; ERR_CANCELLED;
 * ERR_NOMEM. */
int quantiser_train(enum code_kind kind, const float *sample, uint32_t count, uint32_t dim,
                    uint32_t code_bytes, uint64_t seed, struct pool *pool, struct job *job,
                    struct quantiser **out, struct error *err);
void quantiser_free(struct quantiser *quantiser);

enum code_kind quantiser_kind(const struct quantiser *quantiser);
const char *code_kind_name(enum code_kind kind);
int code_kind_parse(const char *text, enum code_kind *out, struct error *err);
uint32_t quantiser_dim(const struct quantiser *quantiser);
uint32_t quantiser_code_bytes(const struct quantiser *quantiser);
/* Mean squared error of decoded vectors over the part of the sample held out of training. */
float quantiser_distortion(const struct quantiser *quantiser);
/* Heap bytes it holds. */
uint64_t quantiser_memory_bytes(const struct quantiser *quantiser);

/* count vectors (count x dim floats) to count x code_bytes. GEMM inside, over the pool. */
int quantiser_encode(const struct quantiser *quantiser, const float *vectors, uint64_t count,
                     struct pool *pool, uint8_t *codes, struct error *err);
/* Approximate vector of one code: dim floats. */
void quantiser_decode(const struct quantiser *quantiser, const uint8_t *code, float *vector);

/* Floats a query's lookup table takes, and scratch floats quantiser_table needs. */
size_t quantiser_table_floats(const struct quantiser *quantiser);
size_t quantiser_scratch_floats(const struct quantiser *quantiser);
/* Fills `table` for a query (dim floats) under METRIC_L2 (estimates squared distance) or METRIC_IP
 * (estimates minus the inner product, so that smaller is better in both). Cosine callers pass
 * normalised vectors and METRIC_IP. No allocation. */
void quantiser_table(const struct quantiser *quantiser, enum metric metric, const float *query,
                     float *scratch, float *table);
/* out[i] = estimate for the code of row rows[i]; codes are row-major, code_bytes each. */
void quantiser_estimate(const struct quantiser *quantiser, const float *table, const uint8_t *codes,
                        const uint32_t *rows, uint32_t count, float *out);

/* Bytes for a segment's section and back; `where` names the source in errors. */
int quantiser_encode_bytes(const struct quantiser *quantiser, uint8_t **out, size_t *bytes,
                           struct error *err);
int quantiser_decode_bytes(const uint8_t *data, size_t bytes, const char *where,
                           struct quantiser **out, struct error *err);

#endif
