/* The space the graph is built in. Vamana compares by squared L2, so the metric is put into the
 * vectors: u8 and i8 under L2 stay as they are; floats under L2 are float32; cosine takes x / |x|;
 * inner product takes (x, sqrt(M^2 - |x|^2)) with M the largest norm, in which nearest by L2 is
 * greatest by inner product (Bachrach et al., "Speeding Up the Xbox Recommender System Using a
 * Euclidean Transformation for Inner-Product Spaces", 2014). That is for the edges alone: codes,
 * pages and scores use the true metric. */
#include "index/segment_build.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/calibrate.h"
#include "index/cells.h"
#include "index/flat.h"
#include "index/graph_file.h"
#include "index/page_codec.h"
#include "index/page_layout.h"
#include "index/rows.h"
#include "index/vamana.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/segment_writer.h"

#define FORMAT_VERSION 2u
#define READ_BYTES (8u << 20)
#define SAMPLE_ROWS 65536u
#define ENCODE_ROWS 16384u
#define PAGE_RUN 512u /* pages encoded at once */
#define ROWS_MIN 256u
#define LIST_PLACES 24u /* nearest neighbours that make the order */
#define REFINE_ROUNDS 8u
#define CELL_ROWS 72u /* about, in whole pages: finer cells cost memory, coarser ones scans */
#define TIER_ROWS_MIN 1000u
#define QUERIES_MAX 1000u /* rows left out of the order to calibrate with */
#define QUERIES_MIN 100u  /* fewer say little about a recall of 0.99 */
#define QUERY_SHARE 50u   /* one row in so many at most */
#define TRUTH_K 100u

struct build {
    struct vfs *vfs;
    const struct vector_source *source;
    const struct segment_build_rows *rows;
    struct segment_build_params params;
    struct pool *pool;
    struct job *job;
    struct segment_build_result *result;

    uint32_t count;
    uint32_t dim;
    enum element_type element;
    enum vector_store store;
    bool normalised;
    bool exact_pages;

    struct vector_matrix space; /* what the graph is built in */
    uint8_t *space_data;
    uint8_t *raw; /* integers under cosine, whose space is normalised: the input; else NULL */
    float *norms; /* inner product: |x|, until the last dimension is filled */
    uint8_t input_digest[DIGEST_BYTES];

    struct quantiser *quantiser;
    struct code_bake_off bake_off;
    struct graph *graph;
    struct neighbour_lists lists;
    struct page_layout_params layout;
    uint32_t *apart; /* rows to calibrate with */
    uint32_t cell_pages;
    struct cells_builder *cells;
    uint32_t *order;     /* position -> row */
    uint32_t *positions; /* row -> position */
    struct page_format format;
    struct segment_writer *writer;
};

static bool is_float(enum element_type type)
{
    return type == ELEMENT_F32;
}

/* The element type and dimension of the space. */
static void space_shape(enum metric metric, enum element_type element, uint32_t dim,
                        enum element_type *type, uint32_t *space_dim)
{
    *type = metric == METRIC_L2 ? element : ELEMENT_F32;
    *space_dim = metric == METRIC_IP ? dim + 1 : dim;
}

static uint32_t code_bytes_default(uint32_t dim)
{
    uint32_t bytes = dim / 4;

    bytes = bytes < 16 ? 16 : bytes > 192 ? 192 : bytes;
    return bytes > dim ? dim : bytes;
}

static int params_check(const struct vector_source *source, struct segment_build_params *params,
                        struct error *err)
{
    enum element_type element = vector_source_type(source);
    uint32_t dim = vector_source_dim(source);
    uint64_t rows = vector_source_rows(source);

    if (element != ELEMENT_F32 && element != ELEMENT_U8 && element != ELEMENT_I8)
        return error_set(err, ERR_UNSUPPORTED, "%s holds %s vectors; build takes f32, u8 and i8",
                         vector_source_name(source), element_name(element));
    if (rows < ROWS_MIN)
        return error_set(err, ERR_INVALID,
                         "%s has %" PRIu64 " rows; training the codes needs at least %u",
                         vector_source_name(source), rows, ROWS_MIN);
    if (rows > UINT32_MAX - 1)
        return error_set(err, ERR_INVALID, "%s has %" PRIu64 " rows; a segment holds at most %u",
                         vector_source_name(source), rows, UINT32_MAX - 1);
    if (dim >= DISTANCE_DIM_MAX)
        return error_set(err, ERR_INVALID, "%s has %u dimensions; at most %u are supported",
                         vector_source_name(source), dim, DISTANCE_DIM_MAX - 1);
    if (!params->code_bytes)
        params->code_bytes = code_bytes_default(dim);
    if (params->code_bytes > dim + 1)
        return error_set(err, ERR_INVALID,
                         "--code-bytes %u exceeds the dimension %u and a byte for the distortion",
                         params->code_bytes, dim);
    if (!params->store)
        params->store = is_float(element) ? STORE_F16 : element == ELEMENT_U8 ? STORE_U8 : STORE_I8;
    if (!is_float(element) && params->store != (element == ELEMENT_U8 ? STORE_U8 : STORE_I8))
        return error_set(err, ERR_INVALID,
                         "%s holds %s vectors, which are stored as they are; --store %s is for "
                         "float input",
                         vector_source_name(source), element_name(element),
                         store_name((enum vector_store)params->store));
    if (is_float(element) && params->store != STORE_F32 && params->store != STORE_F16 &&
        params->store != STORE_SQ8)
        return error_set(err, ERR_INVALID,
                         "%s holds f32 vectors, which --store %s cannot hold; wanted f32, f16 or "
                         "8bit",
                         vector_source_name(source), store_name((enum vector_store)params->store));
    if (params->max_degree < 4 || params->max_degree > PAGE_DEGREE_MAX)
        return error_set(err, ERR_INVALID, "--max-degree %u is outside 4..%u", params->max_degree,
                         PAGE_DEGREE_MAX);
    if (params->build_list < params->max_degree / 2 || params->build_list > 4096)
        return error_set(err, ERR_INVALID,
                         "--build-list %u is outside %u..4096 (half the max degree at least)",
                         params->build_list, params->max_degree / 2);
    return 0;
}

int segment_build_plan(const struct vector_source *source, const struct segment_build_params *given,
                       uint32_t workers, uint64_t *bytes, char **sum, struct error *err)
{
    struct segment_build_params params = *given;
    enum element_type type;
    uint32_t dim = vector_source_dim(source), space_dim;
    uint64_t rows = vector_source_rows(source);

    if (params_check(source, &params, err) < 0)
        return -1;
    space_shape(params.metric, vector_source_type(source), dim, &type, &space_dim);

    const struct vamana_params vamana = {params.max_degree, params.build_list, params.alpha,
                                         params.seed};
    uint64_t vectors = rows * element_bytes(type, space_dim);
    uint64_t graph = vamana_memory_bytes(rows, &vamana, workers);
    /* The graph as it is kept, the lists, and what page_layout.h says the trades take. */
    uint64_t layout = rows * (params.max_degree * 4ull + 4) +
                      neighbour_lists_memory_bytes(rows, LIST_PLACES) +
                      rows * (44 + 8 * LIST_PLACES);
    uint64_t sample = (rows < SAMPLE_ROWS ? rows : SAMPLE_ROWS) * dim * 4ull * 3;
    uint64_t order = rows * 8 + rows * 8 * 2; /* positions both ways; keys and their sort */
    uint64_t buffers = 4 * READ_BYTES + (uint64_t)ENCODE_ROWS * dim * 8 + (32u << 20);

    if (params.metric == METRIC_COSINE && !is_float(vector_source_type(source)))
        vectors += rows * dim;
    graph = graph > layout ? graph : layout;
    *bytes = vectors + (graph > sample ? graph : sample) + order + buffers;
    if (sum) {
        char text[256];

        snprintf(text, sizeof text,
                 "vectors %.1f MiB, graph and its order %.1f MiB, positions and keys %.1f MiB, "
                 "buffers %.1f MiB",
                 (double)vectors / (1 << 20), (double)(graph > sample ? graph : sample) / (1 << 20),
                 (double)order / (1 << 20), (double)buffers / (1 << 20));
        *sum = strdup(text);
        if (!*sum)
            return error_set(err, ERR_NOMEM, "no memory for the plan's text");
    }
    return 0;
}

/* ---- reading ---- */

static void to_float(const uint8_t *in, enum element_type type, uint64_t n, float *out)
{
    if (type == ELEMENT_F32)
        memcpy(out, in, n * 4);
    else if (type == ELEMENT_U8)
        for (uint64_t i = 0; i < n; i++)
            out[i] = in[i];
    else
        for (uint64_t i = 0; i < n; i++)
            out[i] = (int8_t)in[i];
}

struct ingest {
    struct build *b;
    const uint8_t *block;
    uint64_t first_row;
    uint32_t zeros[64]; /* per range of the block, so that the sum has one order */
};

static bool all_zero(const uint8_t *row, uint64_t bytes, bool floats)
{
    for (uint64_t i = 0; i < bytes; i += floats ? 4 : 1)
        if (floats ? load_f32(row + i) != 0 : row[i] != 0)
            return false;
    return true;
}

static void ingest_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct ingest *in = context;
    struct build *b = in->b;
    uint64_t row_bytes = element_bytes(b->element, b->dim);

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        const uint8_t *row = in->block + i * row_bytes;
        uint64_t at = in->first_row + i;
        uint8_t *space = b->space_data + at * b->space.row_bytes;

        if (all_zero(row, row_bytes, is_float(b->element)))
            __atomic_fetch_add(&in->zeros[0], 1, __ATOMIC_RELAXED);
        if (b->raw)
            memcpy(b->raw + at * row_bytes, row, row_bytes);
        if (b->params.metric == METRIC_L2) {
            memcpy(space, row, row_bytes);
            continue;
        }
        float *vector = (float *)(void *)space;

        to_float(row, b->element, b->dim, vector);
        if (b->params.metric == METRIC_COSINE) {
            vector_normalise(vector, b->dim);
        } else {
            double sum = 0;

            for (uint32_t d = 0; d < b->dim; d++)
                sum += (double)vector[d] * vector[d];
            b->norms[at] = (float)sqrt(sum);
        }
    }
}

static int build_read(struct build *b, struct error *err)
{
    uint64_t row_bytes = element_bytes(b->element, b->dim);
    uint64_t block_rows = READ_BYTES / row_bytes ? READ_BYTES / row_bytes : 1;
    struct ingest in = {.b = b};
    struct digest *digest = digest_new();
    uint8_t *block = malloc(block_rows * row_bytes);
    int rc = -1;

    job_phase(b->job, "read", b->count);
    b->space_data = malloc(b->count * b->space.row_bytes);
    if (b->params.metric == METRIC_COSINE && !is_float(b->element))
        b->raw = malloc(b->count * row_bytes);
    if (b->params.metric == METRIC_IP)
        b->norms = malloc(b->count * sizeof *b->norms);
    if (!digest || !block || !b->space_data ||
        (b->params.metric == METRIC_COSINE && !is_float(b->element) && !b->raw) ||
        (b->params.metric == METRIC_IP && !b->norms)) {
        error_set(err, ERR_NOMEM, "no memory for %u vectors of %u dimensions", b->count, b->dim);
        goto done;
    }
    b->space.data = b->space_data;
    for (uint64_t first = 0; first < b->count; first += block_rows) {
        uint64_t rows = b->count - first < block_rows ? b->count - first : block_rows;

        if (vector_source_read(b->source, first, rows, block, err) < 0 ||
            vector_source_check(b->source, block, first, rows, err) < 0)
            goto done;
        digest_update(digest, block, rows * row_bytes);
        in.block = block;
        in.first_row = first;
        pool_for(b->pool, rows, 1024, ingest_range, &in);
        if (job_advance(b->job, rows, err) < 0)
            goto done;
    }
    b->result->zero_vectors = in.zeros[0];
    if (b->norms) {
        float top = 0;

        for (uint32_t i = 0; i < b->count; i++)
            top = b->norms[i] > top ? b->norms[i] : top;
        for (uint32_t i = 0; i < b->count; i++) {
            double rest = (double)top * top - (double)b->norms[i] * b->norms[i];
            float *vector = (float *)(void *)(b->space_data + i * b->space.row_bytes);

            vector[b->dim] = rest > 0 ? (float)sqrt(rest) : 0;
        }
        free(b->norms);
        b->norms = NULL;
    }
    rc = 0;
done:
    if (digest)
        digest_finish(digest, b->input_digest);
    free(block);
    return rc;
}

/* The vector codes are made of: the row as distances see it, as dim floats. */
static void row_floats(const struct build *b, uint32_t row, float *out)
{
    const uint8_t *space = b->space_data + row * b->space.row_bytes;

    to_float(space, b->space.type, b->dim, out);
}

/* ---- codes ---- */

static int build_train(struct build *b, struct error *err)
{
    uint32_t count = b->count < SAMPLE_ROWS ? b->count : SAMPLE_ROWS;
    float *sample = malloc((uint64_t)count * b->dim * sizeof *sample);
    struct random random;
    int rc = -1;

    job_phase(b->job, "train", 0);
    if (!sample)
        return error_set(err, ERR_NOMEM, "no memory for a training sample of %u rows", count);
    random_init(&random, b->params.seed, 1);
    /* One row from each of `count` equal stretches, in shuffled order: the quantiser holds out the
     * sample's end, which must be no stretch of the file. */
    uint32_t *shuffle = malloc(count * sizeof *shuffle);

    if (!shuffle) {
        error_set(err, ERR_NOMEM, "no memory for a training sample of %u rows", count);
        goto done;
    }
    random_permutation(&random, shuffle, count);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t begin = (uint64_t)i * b->count / count;
        uint64_t end = (uint64_t)(i + 1) * b->count / count;

        row_floats(b, (uint32_t)(begin + random_below(&random, end - begin)),
                   sample + (uint64_t)shuffle[i] * b->dim);
    }
    const struct quantiser_params code = {
        b->params.code,
        /* An inner product's estimate has no distortion to correct. */
        b->params.metric == METRIC_IP && b->params.own_distortion == CHOICE_AUTO
            ? CHOICE_NO
            : b->params.own_distortion,
        b->params.code_bytes, b->params.seed};

    rc = quantiser_train(&code, sample, count, b->dim, b->pool, b->job, &b->quantiser, &b->bake_off,
                         err);
done:
    free(shuffle);
    free(sample);
    return rc;
}

struct gather {
    const struct build *b;
    uint32_t first;
    float *out;
};

static void gather_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct gather *g = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++)
        row_floats(g->b, g->b->order[g->first + i], g->out + i * g->b->dim);
}

static int write_cells(struct build *b, struct error *err)
{
    struct cells *cells = NULL;
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (cells_builder_finish(b->cells, &cells, err) < 0 ||
        cells_encode_bytes(cells, &bytes, &count, err) < 0 ||
        segment_writer_begin(b->writer, "f0.cells", SECTION_CELLS, FILE_BLOCK_BYTES, err) < 0 ||
        segment_writer_append(b->writer, bytes, count, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    free(bytes);
    cells_free(cells);
    return rc;
}

/* Codes, and the centroids of the cells on the way. */
static int write_codes(struct build *b, struct error *err)
{
    uint32_t code_bytes = quantiser_code_bytes(b->quantiser);
    float *vectors = malloc((uint64_t)ENCODE_ROWS * b->dim * sizeof *vectors);
    uint8_t *codes = malloc((uint64_t)ENCODE_ROWS * code_bytes);
    int rc = -1;

    job_phase(b->job, "codes", b->count);
    if (!vectors || !codes) {
        error_set(err, ERR_NOMEM, "no memory for a block of codes");
        goto done;
    }
    if (cells_builder_new(b->count, b->cell_pages * b->format.capacity, b->dim, &b->cells, err) <
            0 ||
        segment_writer_begin(b->writer, "f0.codes", SECTION_CODES, FILE_BLOCK_BYTES, err) < 0)
        goto done;
    for (uint32_t first = 0; first < b->count; first += ENCODE_ROWS) {
        uint32_t rows = b->count - first < ENCODE_ROWS ? b->count - first : ENCODE_ROWS;
        struct gather gather = {b, first, vectors};

        pool_for(b->pool, rows, 256, gather_range, &gather);
        cells_builder_add(b->cells, vectors, rows);
        if (quantiser_encode(b->quantiser, vectors, rows, b->pool, codes, err) < 0 ||
            segment_writer_append(b->writer, codes, (uint64_t)rows * code_bytes, err) < 0 ||
            job_advance(b->job, rows, err) < 0)
            goto done;
    }
    if (segment_writer_end(b->writer, err) < 0)
        goto done;
    rc = write_cells(b, err);
done:
    free(vectors);
    free(codes);
    return rc;
}

static int write_quantiser(struct build *b, struct error *err)
{
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (quantiser_encode_bytes(b->quantiser, &bytes, &count, err) < 0)
        return -1;
    if (segment_writer_begin(b->writer, "f0.quantiser", SECTION_QUANTISER, FILE_BLOCK_BYTES, err) ==
            0 &&
        segment_writer_append(b->writer, bytes, count, err) == 0)
        rc = segment_writer_end(b->writer, err);
    free(bytes);
    return rc;
}

/* ---- pages ---- */

struct page_run {
    struct build *b;
    uint64_t first_page;
    uint8_t *payload;
    uint64_t kept[PAGE_RUN];
    uint64_t given[PAGE_RUN];
    struct error errors[1];
    bool failed;
};

static int64_t row_key(const struct build *b, uint32_t row)
{
    return b->rows->int64_keys ? b->rows->int64_keys[row] : (int64_t)row;
}

static void store_row(const struct build *b, uint32_t row, float *scratch, uint8_t *out)
{
    if (b->raw)
        to_float(b->raw + row * element_bytes(b->element, b->dim), b->element, b->dim, scratch);
    else
        row_floats(b, row, scratch);
    store_encode(b->store, b->params.metric, scratch, b->dim, out);
}

static int encode_page(struct page_run *run, uint64_t i, struct error *err)
{
    struct build *b = run->b;
    uint64_t page = run->first_page + i;
    uint32_t count = page_node_count(&b->format, page);
    uint32_t degree_max = b->graph->max_degree;
    struct page_node *nodes = calloc(count, sizeof *nodes);
    uint8_t *vectors = malloc((uint64_t)count * b->format.vector_bytes);
    uint32_t *neighbours = malloc((uint64_t)count * degree_max * sizeof *neighbours);
    float *scratch = malloc(b->dim * sizeof *scratch);
    int rc = -1;

    if (!nodes || !vectors || !neighbours || !scratch) {
        error_set(err, ERR_NOMEM, "no memory for a page");
        goto done;
    }
    for (uint32_t slot = 0; slot < count; slot++) {
        uint32_t row = b->order[page * b->format.capacity + slot];
        uint32_t *list = neighbours + (uint64_t)slot * degree_max;

        store_row(b, row, scratch, vectors + (uint64_t)slot * b->format.vector_bytes);
        for (uint32_t e = 0; e < b->graph->degrees[row]; e++)
            list[e] = b->positions[b->graph->neighbours[(uint64_t)row * degree_max + e]];
        nodes[slot] =
            (struct page_node){.vector = vectors + (uint64_t)slot * b->format.vector_bytes,
                               .key = row_key(b, row),
                               .row = row,
                               .neighbours = list,
                               .degree = b->graph->degrees[row]};
    }
    rc = page_encode(&b->format, page, nodes,
                     run->payload + i * (b->format.page_bytes - BLOCK_CRC_BYTES), &run->kept[i],
                     &run->given[i], err);
done:
    free(nodes);
    free(vectors);
    free(neighbours);
    free(scratch);
    return rc;
}

static void page_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct page_run *run = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        struct error err = ERROR_INIT;

        if (encode_page(run, i, &err) < 0 &&
            !__atomic_exchange_n(&run->failed, true, __ATOMIC_ACQ_REL))
            run->errors[0] = err;
    }
}

static int write_pages(struct build *b, struct error *err)
{
    uint32_t payload = b->format.page_bytes - BLOCK_CRC_BYTES;
    uint64_t pages = b->format.page_count;
    struct page_run *run = calloc(1, sizeof *run);
    int rc = -1;

    job_phase(b->job, "pages", pages);
    if (run)
        run->payload = malloc((uint64_t)PAGE_RUN * payload);
    if (!run || !run->payload) {
        error_set(err, ERR_NOMEM, "no memory for a run of pages");
        goto done;
    }
    run->b = b;
    if (segment_writer_begin(b->writer, "f0.pages", SECTION_PAGES, b->format.page_bytes, err) < 0)
        goto done;
    for (uint64_t first = 0; first < pages; first += PAGE_RUN) {
        uint64_t count = pages - first < PAGE_RUN ? pages - first : PAGE_RUN;

        run->first_page = first;
        memset(run->kept, 0, sizeof run->kept);
        memset(run->given, 0, sizeof run->given);
        pool_for(b->pool, count, 8, page_range, run);
        if (run->failed) {
            *err = run->errors[0];
            goto done;
        }
        for (uint64_t i = 0; i < count; i++) {
            b->result->edges_kept += run->kept[i];
            b->result->edges_given += run->given[i];
        }
        if (segment_writer_append(b->writer, run->payload, count * payload, err) < 0 ||
            job_advance(b->job, count, err) < 0)
            goto done;
    }
    rc = segment_writer_end(b->writer, err);
done:
    if (run)
        free(run->payload);
    free(run);
    return rc;
}

/* ---- originals, rows, keys ---- */

static int write_originals(struct build *b, struct error *err)
{
    uint64_t row_bytes = element_bytes(b->element, b->dim);
    uint8_t *row = malloc(row_bytes);
    int rc = -1;

    job_phase(b->job, "originals", b->count);
    if (!row)
        return error_set(err, ERR_NOMEM, "no memory for a vector");
    if (segment_writer_begin(b->writer, "f0.vectors", SECTION_VECTORS, FILE_BLOCK_BYTES, err) < 0)
        goto done;
    for (uint32_t position = 0; position < b->count; position++) {
        /* Under L2 the space is the input; else the file is read again, row by row. */
        const uint8_t *from = b->space_data + b->order[position] * b->space.row_bytes;

        if (b->params.metric == METRIC_COSINE) {
            if (vector_source_read(b->source, b->order[position], 1, row, err) < 0)
                goto done;
            from = row;
        }
        if (segment_writer_append(b->writer, from, row_bytes, err) < 0 ||
            (position % 1024 == 1023 && job_advance(b->job, 1024, err) < 0))
            goto done;
    }
    rc = segment_writer_end(b->writer, err);
done:
    free(row);
    return rc;
}

static int write_rows(struct build *b, struct error *err)
{
    struct rows_writer *rows = NULL;
    struct record_buffer record = {0};
    int rc = -1;

    job_phase(b->job, "rows", b->count);
    if (segment_writer_begin(b->writer, "rows", SECTION_ROWS, FILE_BLOCK_BYTES, err) < 0 ||
        rows_writer_new(b->writer, &rows, err) < 0)
        goto done;
    for (uint32_t position = 0; position < b->count; position++) {
        if (b->rows->record(b->rows->context, b->order[position], &record, err) < 0 ||
            rows_writer_append(rows, record.data, record.bytes, err) < 0 ||
            (position % 1024 == 1023 && job_advance(b->job, 1024, err) < 0))
            goto done;
    }
    if (rows_writer_finish(rows, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    record_release(&record);
    rows_writer_free(rows);
    return rc;
}

static int compare_entries(const void *a, const void *b)
{
    const struct key_entry *x = a, *y = b;

    if (x->ordinal != y->ordinal)
        return x->ordinal < y->ordinal ? -1 : 1;
    return (x->position > y->position) - (x->position < y->position);
}

/* The sorted entries of all keys, numbered by position; by row while there is no order yet. */
static struct key_entry *key_entries(const struct build *b, struct error *err)
{
    struct key_entry *entries = malloc((uint64_t)b->count * sizeof *entries);

    if (!entries) {
        error_set(err, ERR_NOMEM, "no memory for %u keys", b->count);
        return NULL;
    }
    for (uint32_t i = 0; i < b->count; i++) {
        uint32_t row = b->order ? b->order[i] : i;

        entries[i].position = i;
        entries[i].ordinal =
            b->rows->text_keys ? key_hash(b->rows->text_keys[row], strlen(b->rows->text_keys[row]))
                               : key_ordinal_int64(row_key(b, row));
    }
    qsort(entries, b->count, sizeof *entries, compare_entries);
    return entries;
}

/* Before anything that takes long. Equal hashes of text keys are told apart by the texts. */
static int duplicates_refuse(const struct build *b, struct error *err)
{
    struct key_entry *entries;
    int rc = -1;

    if (!b->rows->text_keys && !b->rows->int64_keys)
        return 0;
    entries = key_entries(b, err);
    if (!entries)
        return -1;
    for (uint32_t i = 1; i < b->count; i++)
        for (uint32_t j = i; j > 0 && entries[j - 1].ordinal == entries[i].ordinal; j--) {
            uint32_t low = entries[j - 1].position, high = entries[i].position;

            if (!b->rows->text_keys) {
                error_set(err, ERR_INVALID, "key %" PRId64 " stands twice: in rows %u and %u",
                          row_key(b, low), low, high);
                goto done;
            }
            if (!strcmp(b->rows->text_keys[low], b->rows->text_keys[high])) {
                error_set(err, ERR_INVALID, "key '%.200s' stands twice: in rows %u and %u",
                          b->rows->text_keys[low], low, high);
                goto done;
            }
        }
    rc = 0;
done:
    free(entries);
    return rc;
}

static int write_keys(struct build *b, struct error *err)
{
    struct key_entry *entries;
    int rc = -1;

    job_phase(b->job, "keys", b->count);
    entries = key_entries(b, err);
    if (!entries)
        return -1;
    if (segment_writer_begin(b->writer, "keys", SECTION_KEYS, FILE_BLOCK_BYTES, err) < 0 ||
        keys_write(b->writer, entries, b->count, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    free(entries);
    return rc;
}

/* ---- what the segment says of itself ---- */

static int segment_id_make(const struct build *b, uint8_t id[DIGEST_BYTES], struct error *err)
{
    const struct segment_build_params *p = &b->params;
    char text[512];
    struct digest *digest = digest_new();

    if (!digest)
        return error_set(err, ERR_NOMEM, "no memory for the segment's id");
    snprintf(text, sizeof text,
             "annd segment %u shard 0 rows %u dim %u element %u metric %u store %u code %u/%u/%u "
             "degree %u list %u alpha %a seed %" PRIu64 " originals %d serve %" PRIu64
             " queries %u",
             FORMAT_VERSION, b->count, b->dim, (unsigned)b->element, (unsigned)p->metric,
             (unsigned)b->store, (unsigned)p->code, p->code_bytes, (unsigned)p->own_distortion,
             p->max_degree, p->build_list, (double)p->alpha, p->seed, p->keep_originals,
             p->serve_memory_bytes, p->calibrate_count);
    digest_update(digest, text, strlen(text));
    if (p->calibrate_count)
        digest_update(digest, p->calibrate_vectors,
                      (uint64_t)p->calibrate_count * b->dim * sizeof *p->calibrate_vectors);
    digest_update(digest, b->input_digest, DIGEST_BYTES);
    digest_update(digest, b->rows->digest, DIGEST_BYTES);
    digest_finish(digest, id);
    return 0;
}

/* What the choice of the code rests on, a sentence a trial. */
static int trials_fill(const struct build *b, struct manifest *m, struct error *err)
{
    for (uint32_t i = 0; i < b->bake_off.count; i++) {
        const struct code_trial *t = &b->bake_off.trials[i];
        char name[32], text[256];

        snprintf(name, sizeof name, "field.0.trial.%u", i);
        if (t->verified_95 > 0)
            snprintf(text, sizeof text,
                     "%s of %u bytes%s: distortion %.4g; of %u rows, %.1f and %.1f looked at give "
                     "0.95 and 0.99 of the ten nearest (%u queries)%s",
                     code_kind_name(t->kind), t->code_bytes,
                     t->own_distortion ? " with its own distortion" : "", (double)t->distortion,
                     b->bake_off.base_rows, (double)t->verified_95, (double)t->verified_99,
                     b->bake_off.queries, t->chosen ? "; chosen" : "");
        else
            snprintf(text, sizeof text, "%s of %u bytes%s: distortion %.4g; as asked for",
                     code_kind_name(t->kind), t->code_bytes,
                     t->own_distortion ? " with its own distortion" : "", (double)t->distortion);
        if (manifest_set_text(m, name, text, err) < 0)
            return -1;
    }
    return 0;
}

static int manifest_fill(struct build *b, struct error *err)
{
    struct manifest *m = segment_writer_manifest(b->writer);
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {
        {"field.0.dim", b->dim},
        {"field.0.element", b->element},
        {"field.0.metric", b->params.metric},
        {"field.0.store", b->store},
        {"field.0.code_kind", quantiser_kind(b->quantiser)},
        {"field.0.code_bytes", quantiser_code_bytes(b->quantiser)},
        {"field.0.page_bytes", b->format.page_bytes},
        {"field.0.page_capacity", b->format.capacity},
        {"field.0.max_degree", b->graph->max_degree},
        {"field.0.build_list", b->params.build_list},
        {"field.0.entry_point", b->positions[b->graph->entry_point]},
        {"field.0.page_holds_keys", b->format.holds_keys},
        {"field.0.page_holds_rows", b->format.holds_rows},
        {"field.0.normalised", b->normalised},
        {"field.0.exact_pages", b->exact_pages},
        {"field.0.zero_vectors", b->result->zero_vectors},
        {"field.0.edges", b->result->edges_kept},
        {"field.0.seed", b->params.seed},
        {"field.0.cell_pages", b->cell_pages},
        {"field.0.own_distortion", quantiser_has_own_distortion(b->quantiser)},
        {"field.0.left_out_rows", b->layout.apart_count},
        {"field.count", 1},
        {"shard", 0},
        {"lsn.min", 0},
        {"lsn.max", 0},
    };

    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (manifest_set_u64(m, numbers[i].name, numbers[i].value, err) < 0)
            return -1;
    if (manifest_set_f64(m, "field.0.alpha", (double)b->params.alpha, err) < 0 ||
        manifest_set_f64(m, "field.0.distortion", (double)quantiser_distortion(b->quantiser), err) <
            0 ||
        manifest_set_bytes(m, "input.sha256", b->input_digest, DIGEST_BYTES, err) < 0 ||
        manifest_set_bytes(m, "rows.sha256", b->rows->digest, DIGEST_BYTES, err) < 0)
        return -1;
    for (uint32_t i = 0; i < b->layout.tier_count; i++) {
        char name[32];

        snprintf(name, sizeof name, "field.0.tier.%u", i);
        if (manifest_set_u64(m, name, b->layout.tier_ends[i], err) < 0)
            return -1;
    }
    return trials_fill(b, m, err);
}

/* ---- order ---- */

/* Rows that recall is calibrated with: one of each of equal stretches. They take no part in the
 * order, see calibrate.h; there are none when the user brought queries, or where there are too few
 * rows to spare. */
static int choose_apart(struct build *b, struct error *err)
{
    uint32_t wanted = b->count / QUERY_SHARE < QUERIES_MAX ? b->count / QUERY_SHARE : QUERIES_MAX;
    uint32_t capacity = b->format.capacity;
    struct random random;

    if (b->params.calibrate_count || wanted < QUERIES_MIN)
        return 0;
    wanted += (b->count - wanted) % capacity; /* the rest fills whole pages */
    b->apart = malloc(wanted * sizeof *b->apart);
    if (!b->apart)
        return error_set(err, ERR_NOMEM, "no memory for %u rows to calibrate with", wanted);
    random_init(&random, b->params.seed, 2);
    for (uint32_t i = 0; i < wanted; i++) {
        uint64_t begin = (uint64_t)i * b->count / wanted;
        uint64_t end = (uint64_t)(i + 1) * b->count / wanted;

        b->apart[i] = (uint32_t)(begin + random_below(&random, end - begin));
    }
    b->layout.apart = b->apart;
    b->layout.apart_count = wanted;
    return 0;
}

static void tier_add(struct build *b, uint64_t rows)
{
    struct page_layout_params *layout = &b->layout;
    uint32_t last = layout->tier_count ? layout->tier_ends[layout->tier_count - 1] : 0;

    rows -= rows % layout->capacity;
    if (rows < last + TIER_ROWS_MIN || rows + layout->apart_count + TIER_ROWS_MIN > b->count)
        return;
    layout->tier_ends[layout->tier_count++] = (uint32_t)rows;
}

/* With a memory to serve from, the one tier that fits it; else tiers for any. A tier costs the rows
 * behind it some of their neighbours on the page, so a tier that no budget will hold is a loss. */
static void choose_tiers(struct build *b)
{
    static const uint32_t percents[] = {5, 10, 20, 40};
    uint32_t capacity = b->format.capacity;

    if (b->params.serve_memory_bytes) {
        uint64_t fixed = (uint64_t)b->count * quantiser_code_bytes(b->quantiser) +
                         quantiser_memory_bytes(b->quantiser) + sizeof(struct disk_index) +
                         sizeof(struct walk_calibration) +
                         cells_memory_plan(b->count, b->cell_pages * capacity, b->dim);

        if (b->params.serve_memory_bytes > fixed)
            tier_add(b, (b->params.serve_memory_bytes - fixed) / b->format.page_bytes * capacity);
        return;
    }
    for (uint32_t i = 0; i < sizeof percents / sizeof percents[0]; i++)
        tier_add(b, (uint64_t)b->count * percents[i] / 100);
}

static int build_order(struct build *b, struct error *err)
{
    b->cell_pages = (CELL_ROWS + b->format.capacity / 2) / b->format.capacity;
    if (b->cell_pages < 1)
        b->cell_pages = 1;
    b->layout.capacity = b->format.capacity;
    b->layout.seed = b->params.seed;
    b->layout.refine_rounds = REFINE_ROUNDS;
    b->order = malloc((uint64_t)b->count * sizeof *b->order);
    b->positions = malloc((uint64_t)b->count * sizeof *b->positions);
    if (!b->order || !b->positions)
        return error_set(err, ERR_NOMEM, "no memory for the order of %u rows", b->count);
    if (choose_apart(b, err) < 0 ||
        neighbour_lists_make(&b->space, b->graph, LIST_PLACES, b->pool, b->job, &b->lists, err) < 0)
        return -1;
    b->layout.neighbours = &b->lists;
    choose_tiers(b);
    if (page_layout_order(&b->space, &b->layout, b->pool, b->job, b->order, err) < 0)
        return -1;
    neighbour_lists_release(&b->lists);
    for (uint32_t position = 0; position < b->count; position++)
        b->positions[b->order[position]] = position;
    return 0;
}

/* ---- graph ---- */

/* What the graph is a function of: the space and vamana's parameters. */
static int graph_key(const struct build *b, uint8_t key[DIGEST_BYTES], struct error *err)
{
    const struct segment_build_params *p = &b->params;
    struct digest *digest = digest_new();
    char text[160];

    if (!digest)
        return error_set(err, ERR_NOMEM, "no memory for the graph's key");
    snprintf(text, sizeof text,
             "annd graph 1 rows %u dim %u element %u metric %u degree %u list %u alpha %a seed "
             "%" PRIu64,
             b->count, b->dim, (unsigned)b->element, (unsigned)p->metric, p->max_degree,
             p->build_list, (double)p->alpha, p->seed);
    digest_update(digest, text, strlen(text));
    digest_update(digest, b->input_digest, DIGEST_BYTES);
    digest_finish(digest, key);
    return 0;
}

static int build_graph(struct build *b, struct error *err)
{
    const struct vamana_params vamana = {b->params.max_degree, b->params.build_list,
                                         b->params.alpha, b->params.seed};
    const char *path = b->params.graph_path;
    struct error found = ERROR_INIT;
    uint8_t key[DIGEST_BYTES];

    job_phase(b->job, "graph", b->count);
    if (path) {
        if (graph_key(b, key, err) < 0)
            return -1;
        if (graph_file_read(b->vfs, path, key, &b->graph, &found) == 0)
            return 0;
        /* Absent, or of another input or parameters: it is made anew. Damage is told. */
        if (found.code != ERR_NOT_FOUND && found.code != ERR_INVALID) {
            *err = found;
            return -1;
        }
    }
    if (vamana_build(&b->space, &vamana, b->pool, b->job, &b->graph, err) < 0)
        return -1;
    return path ? graph_file_write(b->vfs, path, b->graph, key, err) : 0;
}

/* ---- calibration ---- */

static int write_calibration(struct build *b, const struct walk_calibration *calibration,
                             struct error *err)
{
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (walk_calibration_encode(calibration, &bytes, &count, err) < 0)
        return -1;
    if (segment_writer_begin(b->writer, "f0.calibration", SECTION_STATS, FILE_BLOCK_BYTES, err) ==
            0 &&
        segment_writer_append(b->writer, bytes, count, err) == 0)
        rc = segment_writer_end(b->writer, err);
    free(bytes);
    return rc;
}

/* Truth by row numbers to truth by positions, a query's own row left out. */
static void truth_positions(const struct build *b, const struct truth *truth, uint32_t truth_k,
                            uint32_t *out)
{
    for (uint32_t q = 0; q < truth->query_count; q++) {
        const uint32_t *ids = truth->ids + (uint64_t)q * truth->k;
        uint32_t kept = 0;

        for (uint32_t i = 0; i < truth->k && kept < truth_k; i++)
            if (!b->apart || ids[i] != b->apart[q])
                out[(uint64_t)q * truth_k + kept++] = b->positions[ids[i]];
    }
}

/* Measures on the files as they are to be published. */
static int build_calibrate(struct build *b, struct error *err)
{
    uint32_t count = b->apart ? b->layout.apart_count : b->params.calibrate_count;
    uint32_t truth_k = b->count - 1 < TRUTH_K ? b->count - 1 : TRUTH_K;
    uint64_t row_bytes = element_bytes(b->element, b->dim);
    struct walk_calibration *calibration = NULL;
    struct segment *segment = NULL;
    struct truth truth = {0};
    float *vectors = NULL;
    uint32_t *positions = NULL, *hidden = NULL;
    uint8_t *row = NULL;
    int rc = -1;

    if (!count)
        return 0;
    calibration = calloc(1, sizeof *calibration);
    positions = malloc((uint64_t)count * truth_k * sizeof *positions);
    hidden = malloc(count * sizeof *hidden);
    row = malloc(row_bytes);
    vectors = malloc((uint64_t)count * b->dim * sizeof *vectors);
    if (!calibration || !positions || !hidden || !row || !vectors) {
        error_set(err, ERR_NOMEM, "no memory for the calibration");
        goto done;
    }
    for (uint32_t i = 0; i < count && b->apart; i++) {
        if (vector_source_read(b->source, b->apart[i], 1, row, err) < 0)
            goto done;
        to_float(row, b->element, b->dim, vectors + (uint64_t)i * b->dim);
        hidden[i] = b->positions[b->apart[i]];
    }
    if (!b->apart)
        memcpy(vectors, b->params.calibrate_vectors, (uint64_t)count * b->dim * sizeof *vectors);
    if (flat_truth(b->source, vectors, count, b->apart ? truth_k + 1 : truth_k, b->params.metric,
                   b->pool, b->job, &truth, err) < 0)
        goto done;
    truth_positions(b, &truth, truth_k, positions);
    const struct calibrate_queries queries = {vectors, count, b->apart ? hidden : NULL, positions,
                                              truth_k};

    if (segment_writer_preview(b->writer, err) < 0 ||
        segment_open(b->vfs, segment_writer_folder(b->writer), &segment, err) < 0 ||
        calibrate_field(segment, 0, &queries, b->params.serve_memory_bytes, b->params.memory_bytes,
                        b->pool, b->job, calibration, err) < 0)
        goto done;
    rc = write_calibration(b, calibration, err);
done:
    segment_close(segment);
    truth_release(&truth);
    free(calibration);
    free(positions);
    free(hidden);
    free(row);
    free(vectors);
    return rc;
}

/* ---- the whole ---- */

static int build_all(struct build *b, const char *folder, struct error *err)
{
    uint8_t id[DIGEST_BYTES];
    char hex[2 * DIGEST_BYTES + 1], path[FILE_PATH_MAX];

    if (duplicates_refuse(b, err) < 0 || build_read(b, err) < 0 || build_train(b, err) < 0)
        return -1;
    if (build_graph(b, err) < 0)
        return -1;
    job_phase(b->job, "order", 0);
    if (page_format_choose(&b->format, b->store, b->params.metric, b->dim, b->params.max_degree,
                           b->count, !b->rows->text_keys, false, err) < 0 ||
        build_order(b, err) < 0)
        return -1;
    if (segment_id_make(b, id, err) < 0)
        return -1;
    digest_hex(id, DIGEST_BYTES, hex);
    snprintf(b->result->name, sizeof b->result->name, "seg-%.16s", hex);
    if (file_path_join(path, folder, b->result->name, err) < 0 ||
        segment_writer_open(b->vfs, path, id, b->count, &b->writer, err) < 0)
        return -1;
    if (write_codes(b, err) < 0 || write_quantiser(b, err) < 0 || write_pages(b, err) < 0)
        return -1;
    if (b->params.keep_originals && !b->exact_pages && write_originals(b, err) < 0)
        return -1;
    if (b->rows->record && write_rows(b, err) < 0)
        return -1;
    if (write_keys(b, err) < 0 || manifest_fill(b, err) < 0)
        return -1;
    for (uint32_t i = 0; i < b->count; i++)
        b->result->mean_degree += b->graph->degrees[i];
    b->result->mean_degree /= b->count;
    /* Calibration holds pages in memory instead. */
    graph_free(b->graph);
    b->graph = NULL;
    free(b->space_data);
    b->space_data = NULL;
    if (build_calibrate(b, err) < 0)
        return -1;
    job_phase(b->job, "publish", 0);
    return segment_writer_publish(b->writer, err);
}

int segment_build(struct vfs *vfs, const char *folder, const struct vector_source *source,
                  const struct segment_build_rows *rows, const struct segment_build_params *params,
                  struct pool *pool, struct job *job, struct segment_build_result *result,
                  struct error *err)
{
    struct build b = {.vfs = vfs,
                      .source = source,
                      .rows = rows,
                      .params = *params,
                      .pool = pool,
                      .job = job,
                      .result = result};
    uint64_t needed;
    char *sum = NULL;
    int rc = -1;

    memset(result, 0, sizeof *result);
    if (params_check(source, &b.params, err) < 0 ||
        segment_build_plan(source, params, pool_workers(pool), &needed, &sum, err) < 0)
        goto done;
    if (params->memory_bytes && needed > params->memory_bytes) {
        error_set(err, ERR_BUDGET,
                  "building %s needs %.1f MiB of memory (%s), --memory grants %.1f MiB",
                  vector_source_name(source), (double)needed / (1 << 20), sum,
                  (double)params->memory_bytes / (1 << 20));
        error_remedy(err, "grant more memory, or lower --max-degree (now %u)", params->max_degree);
        goto done;
    }
    b.count = (uint32_t)vector_source_rows(source);
    b.dim = vector_source_dim(source);
    b.element = vector_source_type(source);
    b.store = (enum vector_store)b.params.store;
    b.normalised = b.params.metric == METRIC_COSINE && is_float(b.element);
    b.exact_pages = !is_float(b.element) || (b.store == STORE_F32 && !b.normalised);
    space_shape(b.params.metric, b.element, b.dim, &b.space.type, &b.space.dim);
    b.space.row_bytes = element_bytes(b.space.type, b.space.dim);
    b.space.count = b.count;
    if (build_all(&b, folder, err) < 0)
        goto done;
    result->row_count = b.count;
    result->code = quantiser_kind(b.quantiser);
    result->code_bytes = quantiser_code_bytes(b.quantiser);
    result->store = b.store;
    result->page_bytes = b.format.page_bytes;
    result->page_capacity = b.format.capacity;
    result->distortion = quantiser_distortion(b.quantiser);
    job_finish(job);
    rc = 0;
done:
    free(sum);
    segment_writer_close(b.writer);
    quantiser_free(b.quantiser);
    cells_builder_free(b.cells);
    neighbour_lists_release(&b.lists);
    free(b.apart);
    graph_free(b.graph);
    free(b.space_data);
    free(b.raw);
    free(b.norms);
    free(b.order);
    free(b.positions);
    return rc;
}
