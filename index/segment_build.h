/* segment_build: vectors, keys and attributes become one published segment.
 *
 * Stages: train the quantiser on a sample; put the rows in space order (partition.h); make the
 * graph (leaf_graph.h, or vamana.h by insertion); order rows into pages (page_layout.h); write the
 * sections; calibrate (calibrate.h, on the files as they are to be published); publish. Between
 * stages everything stands in the scratch folder of a journal, which says what is done: a build
 * stopped at any moment goes on from there. What is held in memory is known before
 * (build_plan.h) and refused up front where it exceeds the grant. The bytes depend on input,
 * parameters and seed, and on memory only where the page order has to be cut into windows; never
 * on the number of threads, the clock, where things are, or interruptions. */
#ifndef ANND_INDEX_SEGMENT_BUILD_H
#define ANND_INDEX_SEGMENT_BUILD_H

#include <stdbool.h>
#include <stdint.h>

#include "index/element.h"
#include "index/quantiser.h"
#include "index/record.h"
#include "index/schema.h"
#include "index/store.h"
#include "index/vector_source.h"
#include "storage/base/digest.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"
#include "storage/journal.h"

enum graph_builder {
    GRAPH_BUILDER_AUTO,  /* batch, but insert for fewer rows than leaves are worth */
    GRAPH_BUILDER_BATCH, /* leaf_graph.h */
    GRAPH_BUILDER_INSERT /* vamana.h: the reference; all rows and the graph in memory */
};

struct segment_build_params {
    enum metric metric;
    enum code_kind code;
    enum code_choice own_distortion;
    uint32_t code_bytes; /* 0: dim / 4 within 16..192, and no more than dim */
    uint32_t store;      /* enum vector_store, 0: f16 for floats, integers as they are */
    uint32_t max_degree; /* R */
    uint32_t build_list; /* L */
    float alpha;
    uint64_t seed;
    bool keep_originals;
    uint64_t memory_bytes;       /* for the whole build; 0: no limit */
    uint64_t serve_memory_bytes; /* what it will be searched with: one hot tier fits what that
                                  * leaves beside the codes; 0: tiers of 5, 10, 20 and 40 % */
    enum graph_builder builder;
    const float *calibrate_vectors; /* calibrate_count x dim, the user's queries; or NULL */
    uint32_t calibrate_count;
};

/* The rows' keys and records, as the caller has them. */
struct segment_build_rows {
    const struct schema *schema;
    const int64_t *int64_keys;    /* row_count of them; NULL: row numbers, or varchar keys */
    const char *const *text_keys; /* row_count NUL-terminated texts, or NULL */
    /* Fills the record of one row; NULL when rows have none. Rows are asked for in any order, by
     * one thread. The record must be the same each time. */
    int (*record)(void *context, uint64_t row, struct record_buffer *out, struct error *err);
    void *context;
    uint8_t digest[DIGEST_BYTES]; /* of keys, attributes and schema: part of the segment's id */
};

struct segment_build_result {
    uint64_t row_count;
    uint64_t zero_vectors;
    uint64_t edges_given; /* out-of-page edges the graph had */
    uint64_t edges_kept;  /* and those the pages had room for */
    enum code_kind code;
    uint32_t code_bytes;
    enum vector_store store;
    uint32_t page_bytes;
    uint32_t page_capacity;
    float distortion;
    double mean_degree;
    char name[64]; /* of the segment's directory: "seg-" and the first 16 hex digits of its id */
};

/* Fills the defaults of `params` in. ERR_INVALID, ERR_UNSUPPORTED for what cannot be built. */
int segment_build_params_check(const struct vector_source *source,
                               struct segment_build_params *params, struct error *err);

/* Builds `folder`/<result->name>, or goes on with it. journal: the folder's; NULL: one of its own
 * is made in `folder` and removed again, whatever happens. ERR_INVALID: NaN or infinity (row and
 * dimension named), duplicate keys (both rows named), fewer than 256 rows; ERR_BUDGET;
 * ERR_CANCELLED; ERR_NO_SPACE;
 * ... Nothing but the journal and the segment's own "<name>.tmp" is left in `folder` on failure,
 * and without a journal nothing at all. */
int segment_build(struct vfs *vfs, const char *folder, const struct vector_source *source,
                  const struct segment_build_rows *rows, const struct segment_build_params *params,
                  struct journal *journal, struct pool *pool, struct job *job,
                  struct segment_build_result *result, struct error *err);

#endif
