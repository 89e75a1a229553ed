/* segment_parts: the sections of a segment, written from what the stages of segment_build.h left in
 * the scratch folder. Internal to segment_build; nothing else includes it. */
#ifndef ANND_INDEX_SEGMENT_PARTS_H
#define ANND_INDEX_SEGMENT_PARTS_H

#include "index/cells.h"
#include "index/graph_store.h"
#include "index/page_codec.h"
#include "index/page_layout.h"
#include "index/quantiser.h"
#include "index/row_store.h"
#include "index/segment_build.h"
#include "storage/journal.h"
#include "storage/segment_writer.h"

/* A build under way. Places count rows in space order (row_store.h), positions in page order, rows
 * in the input. */
struct build {
    struct vfs *vfs;
    const struct vector_source *source;
    const struct segment_build_rows *rows;
    struct segment_build_params params; /* defaults filled in */
    struct journal *journal;
    struct pool *pool;
    struct job *job;
    struct segment_build_result *result;

    uint32_t count;
    uint32_t dim;
    struct row_shape shape;
    enum vector_store store;
    bool normalised;
    bool exact_pages;
    uint8_t input_digest[DIGEST_BYTES];
    bool hold;            /* the graph and the order find all rows in memory */
    uint32_t window_rows; /* of the page order */

    struct row_store *row_store;
    struct quantiser *quantiser;
    struct graph_store *graph;
    struct page_layout_params layout;
    uint32_t *apart; /* places of the rows to calibrate with */
    uint32_t cell_pages;
    uint32_t *order;     /* position -> place */
    uint32_t *positions; /* place -> position */
    uint32_t *numbers;   /* place -> row */
    struct page_format format;
    struct segment_writer *writer;
};

static inline int64_t build_row_key(const struct build *b, uint32_t row)
{
    return b->rows->int64_keys ? b->rows->int64_keys[row] : (int64_t)row;
}

/* Raw elements as floats. */
void raw_to_floats(const uint8_t *raw, enum element_type type, uint64_t n, float *out);

/* Before anything that takes long: ERR_INVALID names the rows of a key that stands twice. */
int duplicates_refuse(const struct build *b, struct error *err);

/* All sections but the calibration, each unless the writer has it; checkpoints on the way. */
int segment_parts_write(struct build *b, struct error *err);

/* Heap they take besides order, positions and numbers. */
uint64_t segment_parts_memory_bytes(uint64_t count, uint32_t dim, uint64_t raw_bytes,
                                    uint32_t max_degree, uint32_t workers);

#endif
