/* annd generate: a seeded set of vectors in clusters, so that neighbours mean something.
 *
 * Vectors of pictures or texts fill far fewer dimensions than they have. So a row is a cluster's
 * centre, plus LATENT normal factors mixed into all dimensions by one fixed matrix, plus a little
 * noise in each: its neighbours are those whose factors are alike. Queries come from the same
 * centres and factors but another stream. The bytes depend on the arguments alone, and not
 * on --threads; with the same --clusters, --dim, --type and --seed, fewer rows are the first of
 * more. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/vector_file.h"
#include "storage/base/pool.h"
#include "storage/base/random.h"
#include "tools/commands.h"
#include "tools/progress.h"

#define BLOCK_ROWS 4096u
#define BLOCKS_PER_WORKER 4u
#define BATCH_BYTES (UINT64_C(256) << 20) /* at most, but for one block */
#define QUERY_COUNT 1000u
#define LATENT 16u
#define NOISE 0.05f

struct generator {
    enum element_type type;
    uint32_t dim;
    uint32_t clusters;
    float *centres;
    float *mixing; /* LATENT x dim */
};

static int generator_init(struct generator *g, uint64_t seed, struct error *err)
{
    struct random random;

    g->centres = malloc((uint64_t)g->clusters * g->dim * sizeof *g->centres);
    g->mixing = malloc((uint64_t)LATENT * g->dim * sizeof *g->mixing);
    if (!g->centres || !g->mixing)
        return error_set(err, ERR_NOMEM, "no memory for %u cluster centres", g->clusters);
    random_init(&random, seed, 0);
    for (uint64_t i = 0; i < (uint64_t)g->clusters * g->dim; i++)
        g->centres[i] = random_float(&random) * 2 - 1;
    for (uint64_t i = 0; i < (uint64_t)LATENT * g->dim; i++)
        g->mixing[i] = random_normal(&random) * 0.5f / sqrtf((float)LATENT);
    return 0;
}

/* scratch: dim floats. */
static void generator_row(const struct generator *g, struct random *random, float *scratch,
                          uint8_t *out)
{
    const float *centre = g->centres + random_below(random, g->clusters) * g->dim;

    memcpy(scratch, centre, g->dim * sizeof *scratch);
    for (uint32_t factor = 0; factor < LATENT; factor++) {
        float strength = random_normal(random);

        for (uint32_t d = 0; d < g->dim; d++)
            scratch[d] += strength * g->mixing[(uint64_t)factor * g->dim + d];
    }
    for (uint32_t d = 0; d < g->dim; d++) {
        scratch[d] += NOISE * (random_float(random) - 0.5f);
        if (g->type == ELEMENT_U8) {
            float level = 128 + 48 * scratch[d];

            out[d] = level <= 0 ? 0 : level >= 255 ? 255 : (uint8_t)level;
        }
    }
    if (g->type == ELEMENT_F32)
        memcpy(out, scratch, g->dim * sizeof *scratch);
}

/* A batch of blocks that the workers fill side by side. */
struct batch {
    const struct generator *generator;
    uint8_t *rows;  /* row_count packed rows, whole blocks but for the last */
    float *scratch; /* dim floats a worker */
    uint64_t row_count;
    uint64_t row_bytes;
    uint64_t seed;
    uint64_t stream; /* of the batch's first block; the next ones follow */
};

static void generate_blocks(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    const struct batch *batch = context;
    const struct generator *g = batch->generator;

    for (uint64_t block = begin; block < end; block++) {
        uint64_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS;
        struct random random;

        /* A stream per block: rows depend neither on how many there are nor on who makes them. */
        random_init(&random, batch->seed, batch->stream + block);
        for (uint64_t i = first; i < (last < batch->row_count ? last : batch->row_count); i++)
            generator_row(g, &random, batch->scratch + (uint64_t)worker * g->dim,
                          batch->rows + i * batch->row_bytes);
    }
}

static int generate_file(const struct generator *g, const char *path, uint64_t rows, uint64_t seed,
                         uint64_t stream, struct pool *pool, struct job *job, struct error *err)
{
    uint64_t row_bytes = element_bytes(g->type, g->dim), block_bytes = BLOCK_ROWS * row_bytes;
    uint64_t blocks = (uint64_t)BLOCKS_PER_WORKER * pool_workers(pool), batch_rows;
    struct batch batch = {.generator = g, .row_bytes = row_bytes, .seed = seed, .stream = stream};
    struct vector_writer *writer = NULL;
    int rc = -1;

    job_phase(job, "generate", rows);
    if (blocks > BATCH_BYTES / block_bytes)
        blocks = BATCH_BYTES / block_bytes ? BATCH_BYTES / block_bytes : 1;
    batch_rows = blocks * BLOCK_ROWS < rows ? blocks * BLOCK_ROWS : rows;
    batch.rows = malloc(batch_rows * row_bytes);
    batch.scratch = malloc((uint64_t)pool_workers(pool) * g->dim * sizeof *batch.scratch);
    if (!batch.rows || !batch.scratch) {
        error_set(err, ERR_NOMEM, "no memory for a batch of rows");
        goto done;
    }
    if (vector_writer_open(vfs_posix(), path, g->type, g->dim, &writer, err) < 0)
        goto done;
    for (uint64_t first = 0; first < rows; first += batch.row_count) {
        batch.row_count = rows - first < batch_rows ? rows - first : batch_rows;
        blocks = (batch.row_count + BLOCK_ROWS - 1) / BLOCK_ROWS;
        pool_for(pool, blocks, 1, generate_blocks, &batch);
        batch.stream += blocks;
        if (vector_writer_append(writer, batch.rows, batch.row_count, err) < 0 ||
            job_advance(job, batch.row_count, err) < 0)
            goto done;
    }
    rc = vector_writer_close(writer, err);
    writer = NULL;
done:
    vector_writer_abort(writer);
    free(batch.rows);
    free(batch.scratch);
    return rc;
}

static int run(const struct arguments *arguments, struct error *err)
{
    struct generator g = {.type = !strcmp(option_text(arguments, "type"), "u8") ? ELEMENT_U8
                                                                                : ELEMENT_F32,
                          .dim = option_u32(arguments, "dim"),
                          .clusters = option_u32(arguments, "clusters")};
    uint64_t rows = option_u64(arguments, "rows"), seed = option_u64(arguments, "seed");
    const char *output = option_text(arguments, "output");
    const char *queries = option_text(arguments, "queries");
    struct pool *pool = NULL;
    struct job *job = NULL;
    int rc = -1;

    if (!rows || !g.dim || !output) {
        fprintf(stderr, "annd: annd generate needs --rows, --dim and --output\n");
        return EXIT_USAGE;
    }
    if (!g.clusters)
        g.clusters = (uint32_t)(sqrt((double)rows) / 2) + 1;
    if (pool_new(option_u32(arguments, "threads"), &pool, err) < 0)
        goto done;
    job = progress_job(arguments, err);
    if (!job || generator_init(&g, seed, err) < 0 ||
        generate_file(&g, output, rows, seed, 1, pool, job, err) < 0)
        goto done;
    if (queries &&
        generate_file(&g, queries, QUERY_COUNT, seed, UINT64_C(1) << 40, pool, job, err) < 0)
        goto done;
    job_finish(job);
    printf("%s: %llu rows of %u %s, %u clusters, seed %llu\n", output, (unsigned long long)rows,
           g.dim, element_name(g.type), g.clusters, (unsigned long long)seed);
    if (queries)
        printf("%s: %u queries of the same clusters\n", queries, QUERY_COUNT);
    rc = 0;
done:
    progress_end(job);
    pool_free(pool);
    free(g.centres);
    free(g.mixing);
    return rc;
}

static const struct option options[] = {
    {"rows", OPTION_NUMBER, "N", NULL, NULL, "rows to make", 1, UINT32_MAX - 1},
    {"dim", OPTION_NUMBER, "D", NULL, NULL, "dimensions", 1, 32767},
    {"type", OPTION_TEXT, "TYPE", "f32", "f32|u8", "element type", 0, 0},
    {"clusters", OPTION_NUMBER, "N", NULL, NULL, "cluster centres, by default sqrt(rows)/2", 1,
     1u << 24},
    {"seed", OPTION_NUMBER, "N", "1", NULL, "names the set", 0, 0},
    {"output", OPTION_TEXT, "FILE", NULL, NULL, ".fbin or .u8bin to write", 0, 0},
    {"queries", OPTION_TEXT, "FILE", NULL, NULL, "also write 1,000 queries", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default all cores", 1, 1024},
    PROGRESS_OPTION,
    {0},
};

const struct command command_generate = {
    .name = "generate",
    .positional = "",
    .summary = "make a seeded set of vectors in clusters",
    .examples = "  annd generate --rows 100000 --dim 128 --type u8 --output base.u8bin\n"
                "  annd generate --rows 10000 --dim 512 --output b.fbin --queries q.fbin\n",
    .options = options,
    .run = run,
};
