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

#include "index/page_codec.h"
#include "index/page_layout.h"
#include "index/rows.h"
#include "index/vamana.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/segment_writer.h"

#define FORMAT_VERSION 1u
#define READ_BYTES (8u << 20)
#define SAMPLE_ROWS 65536u
#define ENCODE_ROWS 16384u
#define PAGE_RUN 512u /* pages encoded at once */
#define ROWS_MIN 256u

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
    struct graph *graph;
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
    if (params->code_bytes > dim)
        return error_set(err, ERR_INVALID, "--code-bytes %u exceeds the dimension %u",
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
    uint64_t sample = (rows < SAMPLE_ROWS ? rows : SAMPLE_ROWS) * dim * 4ull * 3;
    uint64_t order = rows * 8 + rows * 8 * 2; /* positions both ways; keys and their sort */
    uint64_t buffers = 4 * READ_BYTES + (uint64_t)ENCODE_ROWS * dim * 8 + (32u << 20);

    if (params.metric == METRIC_COSINE && !is_float(vector_source_type(source)))
        vectors += rows * dim;
    *bytes = vectors + (graph > sample ? graph : sample) + order + buffers;
    if (sum) {
        char text[256];

        snprintf(text, sizeof text,
                 "vectors %.1f MiB, graph %.1f MiB, order and keys %.1f MiB, buffers %.1f MiB",
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
    rc = quantiser_train(b->params.code, sample, count, b->dim, b->params.code_bytes,
                         b->params.seed, b->pool, b->job, &b->quantiser, err);
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
    if (segment_writer_begin(b->writer, "f0.codes", SECTION_CODES, FILE_BLOCK_BYTES, err) < 0)
        goto done;
    for (uint32_t first = 0; first < b->count; first += ENCODE_ROWS) {
        uint32_t rows = b->count - first < ENCODE_ROWS ? b->count - first : ENCODE_ROWS;
        struct gather gather = {b, first, vectors};

        pool_for(b->pool, rows, 256, gather_range, &gather);
        if (quantiser_encode(b->quantiser, vectors, rows, b->pool, codes, err) < 0 ||
            segment_writer_append(b->writer, codes, (uint64_t)rows * code_bytes, err) < 0 ||
            job_advance(b->job, rows, err) < 0)
            goto done;
    }
    rc = segment_writer_end(b->writer, err);
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

/* ---- the whole ---- */

static int segment_id_make(const struct build *b, uint8_t id[DIGEST_BYTES], struct error *err)
{
    const struct segment_build_params *p = &b->params;
    char text[256];
    struct digest *digest = digest_new();

    if (!digest)
        return error_set(err, ERR_NOMEM, "no memory for the segment's id");
    snprintf(text, sizeof text,
             "annd segment %u shard 0 rows %u dim %u element %u metric %u store %u code %u/%u "
             "degree %u list %u alpha %a seed %" PRIu64 " originals %d",
             FORMAT_VERSION, b->count, b->dim, (unsigned)b->element, (unsigned)p->metric,
             (unsigned)b->store, (unsigned)p->code, p->code_bytes, p->max_degree, p->build_list,
             (double)p->alpha, p->seed, p->keep_originals);
    digest_update(digest, text, strlen(text));
    digest_update(digest, b->input_digest, DIGEST_BYTES);
    digest_update(digest, b->rows->digest, DIGEST_BYTES);
    digest_finish(digest, id);
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
    return 0;
}

static int build_order(struct build *b, struct error *err)
{
    b->order = malloc((uint64_t)b->count * sizeof *b->order);
    b->positions = malloc((uint64_t)b->count * sizeof *b->positions);
    if (!b->order || !b->positions)
        return error_set(err, ERR_NOMEM, "no memory for the order of %u rows", b->count);
    if (page_layout_order(&b->space, b->format.capacity, b->params.seed, b->pool, b->job, b->order,
                          err) < 0)
        return -1;
    for (uint32_t position = 0; position < b->count; position++)
        b->positions[b->order[position]] = position;
    return 0;
}

static int build_all(struct build *b, const char *folder, struct error *err)
{
    const struct vamana_params vamana = {b->params.max_degree, b->params.build_list,
                                         b->params.alpha, b->params.seed};
    uint8_t id[DIGEST_BYTES];
    char hex[2 * DIGEST_BYTES + 1], path[FILE_PATH_MAX];

    if (duplicates_refuse(b, err) < 0 || build_read(b, err) < 0 || build_train(b, err) < 0)
        return -1;
    job_phase(b->job, "graph", b->count);
    if (vamana_build(&b->space, &vamana, b->pool, b->job, &b->graph, err) < 0)
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
    for (uint32_t i = 0; i < b.count; i++)
        result->mean_degree += b.graph->degrees[i];
    result->mean_degree /= b.count;
    job_finish(job);
    rc = 0;
done:
    free(sum);
    segment_writer_close(b.writer);
    quantiser_free(b.quantiser);
    graph_free(b.graph);
    free(b.space_data);
    free(b.raw);
    free(b.norms);
    free(b.order);
    free(b.positions);
    return rc;
}
