/* Quantiser: compresses vectors to code_bytes bytes each and estimates distances on the codes.
 *
 * One interface over the codes annd knows:
 *   pq      one byte a chunk of consecutive dimensions, 256 centroids each
 *           (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", 2011)
 *   opq     rotation by PCA with balanced allocation of variance to chunks, then pq
 *           (Ge, He, Ke, Sun, "Optimized Product Quantization", 2013, the parametric solution)
 *   scalar  4 or 8 bits a dimension between the sample's quantiles
 * Each may give its last byte to the vector's own distortion: how far the vector is from its code,
 * squared, on a logarithmic scale. An estimate that adds it, in place of the mean, is nearer the
 * truth where vectors differ in how well they are coded.
 *
 * Whatever the kind, each byte of a code has a table of 256 shares, and the sum of the shares is
 * the estimate: code_scan.h does the summing. The vectors a quantiser sees are the ones distances
 * are taken of: for cosine on floats they are normalised by the caller. Immutable once trained; any
 * number of threads may share it. */
#ifndef ANND_INDEX_QUANTISER_H
#define ANND_INDEX_QUANTISER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "index/code_scan.h"
#include "index/element.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

enum code_kind { CODE_AUTO = 0, CODE_PQ = 1, CODE_OPQ = 2, CODE_SCALAR = 3 }; /* values on disk */
enum code_choice { CHOICE_AUTO = 0, CHOICE_NO = 1, CHOICE_YES = 2 };

struct quantiser;

struct quantiser_params {
    enum code_kind kind;
    enum code_choice own_distortion;
    uint32_t code_bytes; /* of the whole code, the distortion's byte included */
    uint64_t seed;
};

/* One code that was tried. verified_95 and _99: how many of the rows with the best estimates have
 * to be looked at so that 95 or 99 % of the true ten nearest are among them, on held-out rows of
 * the sample as queries, the rest as the base; 0 when nothing was compared. Of a large sample all
 * are trained on the same small part; the chosen, and its rival where the choice was
 * close, then on the whole, and their numbers are of that. */
struct code_trial {
    enum code_kind kind;
    bool own_distortion;
    uint32_t code_bytes;
    float distortion; /* mean squared error on held-out rows */
    float verified_95;
    float verified_99;
    bool chosen;
};

#define CODE_TRIALS_MAX 8u

struct code_bake_off {
    struct code_trial trials[CODE_TRIALS_MAX];
    uint32_t count;
    uint32_t base_rows; /* of the comparison */
    uint32_t queries;
};

/* sample: count x dim floats, row-major, in random order, borrowed. CODE_AUTO and CHOICE_AUTO train
 * every kind that fits code_bytes, with and without own distortion, and keep the one that needs the
 * fewest rows verified (verified_95 + verified_99; a tie within 2 %, 10 % where the better has a
 * rotation, goes to the simpler: pq before opq before scalar, without own distortion before with).
 * bake_off tells what was tried (may be NULL). Same bytes for any pool. ERR_INVALID: count < 256,
 * code_bytes outside 1..dim + 1, a kind that cannot have that many bytes; ERR_CANCELLED; ERR_NOMEM.
 */
int quantiser_train(const struct quantiser_params *params, const float *sample, uint32_t count,
                    uint32_t dim, struct pool *pool, struct job *job, struct quantiser **out,
                    struct code_bake_off *bake_off, struct error *err);
void quantiser_free(struct quantiser *quantiser);

enum code_kind quantiser_kind(const struct quantiser *quantiser);
bool quantiser_has_own_distortion(const struct quantiser *quantiser);
const char *code_kind_name(enum code_kind kind);
int code_kind_parse(const char *text, enum code_kind *out, struct error *err);
uint32_t quantiser_dim(const struct quantiser *quantiser);
uint32_t quantiser_code_bytes(const struct quantiser *quantiser);
/* Mean squared error of decoded vectors over the part of the sample held out of training. */
float quantiser_distortion(const struct quantiser *quantiser);
/* The squared error of this code's vector: its own where codes carry it, else the mean. */
float quantiser_code_distortion(const struct quantiser *quantiser, const uint8_t *code);
/* Heap bytes it holds. */
uint64_t quantiser_memory_bytes(const struct quantiser *quantiser);

/* count vectors (count x dim floats) to count x code_bytes. GEMM inside, over the pool. */
int quantiser_encode(const struct quantiser *quantiser, const float *vectors, uint64_t count,
                     struct pool *pool, uint8_t *codes, struct error *err);
/* Approximate vector of one code: dim floats. */
void quantiser_decode(const struct quantiser *quantiser, const uint8_t *code, float *vector);

/* Entries a query's table takes at most, and scratch floats quantiser_table needs. */
size_t quantiser_table_entries(const struct quantiser *quantiser);
size_t quantiser_scratch_floats(const struct quantiser *quantiser);
/* Fills `table` (entries given by the caller) for a query (dim floats) under METRIC_L2 or
 * METRIC_IP, so that offset + step * sum over the first table->chunk_count bytes of a code
 * estimates the squared distance, the code's own or mean distortion included, or minus the inner
 * product: smaller is nearer in both. Cosine callers pass normalised vectors. No allocation. */
void quantiser_table(const struct quantiser *quantiser, enum metric metric, const float *query,
                     float *scratch, struct code_table *table);

/* Bytes for a segment's section and back; `where` names the source in errors. */
int quantiser_encode_bytes(const struct quantiser *quantiser, uint8_t **out, size_t *bytes,
                           struct error *err);
int quantiser_decode_bytes(const uint8_t *data, size_t bytes, const char *where,
                           struct quantiser **out, struct error *err);

#endif
