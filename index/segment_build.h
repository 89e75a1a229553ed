/* segment_build: vectors, keys and attributes become one published segment.
 *
 * Phases: read (checked, digested, into the space the graph is built in), train (quantiser), graph
 * (vamana.h), order (page_layout.h), codes and cells, pages, originals, rows, keys, calibration
 * (calibrate.h, on the files as they are to be published). The input is streamed in
 * blocks; what stays in memory is summed up by segment_build_plan() and refused up front when it
 * exceeds the grant. The bytes depend on input, parameters and seed alone, never on the number of
 * threads, the clock, or where things are. */
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
    uint64_t memory_bytes;          /* for the whole build; 0: no limit */
    uint64_t serve_memory_bytes;    /* what it will be searched with: one hot tier fits what that
                                     * leaves beside the codes; 0: tiers of 5, 10, 20 and 40 % */
    const char *graph_path;         /* graph_file.h: read when it fits, else written; NULL: none */
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

/* Memory the build needs, by holder, for messages: malloc'ed text in *sum (may be NULL). */
int segment_build_plan(const struct vector_source *source,
                       const struct segment_build_params *params, uint32_t workers, uint64_t *bytes,
                       char **sum, struct error *err);

/* Builds `folder`/<result->name>. ERR_INVALID: NaN or infinity (row and dimension named), duplicate
 * keys (both rows named), fewer than 256 rows; ERR_BUDGET; ERR_CANCELLED; ERR_NO_SPACE; ... Nothing
 * is left in `folder` on failure. */
int segment_build(struct vfs *vfs, const char *folder, const struct vector_source *source,
                  const struct segment_build_rows *rows, const struct segment_build_params *params,
                  struct pool *pool, struct job *job, struct segment_build_result *result,
                  struct error *err);

#endif
