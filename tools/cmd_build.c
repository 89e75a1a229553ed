/* annd build: a vector file becomes an index directory.
 *
 * Everything is made in OUTPUT.tmp and renamed at the end: OUTPUT is whole or absent. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index/index_directory.h"
#include "index/segment_build.h"
#include "storage/file.h"
#include "tools/commands.h"
#include "tools/field_facts.h"
#include "tools/progress.h"
#include "tools/queries.h"
#include "tools/row_input.h"

static int store_of(const char *name)
{
    return !strcmp(name, "f32")    ? STORE_F32
           : !strcmp(name, "f16")  ? STORE_F16
           : !strcmp(name, "8bit") ? STORE_SQ8
                                   : 0;
}

static enum code_choice choice_of(const char *name)
{
    return !strcmp(name, "yes") ? CHOICE_YES : !strcmp(name, "no") ? CHOICE_NO : CHOICE_AUTO;
}

/* Memory of the machine, less a tenth for the rest of it. */
static uint64_t memory_default(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) / 10 * 9;
}

/* What the files will take, for a refusal before the work rather than after it. */
static int space_check(const char *folder, const struct vector_source *source, bool originals,
                       struct error *err)
{
    uint64_t bytes = vector_source_rows(source) * vector_source_row_bytes(source), free_bytes;
    uint64_t needed = bytes + bytes / 2 + (originals ? bytes : 0) + (1u << 20);

    if (vfs_posix()->space(vfs_posix(), folder, &free_bytes) < 0 || free_bytes >= needed)
        return 0;
    error_set(err, ERR_BUDGET, "%s has %llu MiB free; the index will take about %llu MiB", folder,
              (unsigned long long)free_bytes >> 20, (unsigned long long)needed >> 20);
    return -1;
}

static void print_result(const char *output, const struct segment_build_result *r, uint32_t dim,
                         enum element_type element, enum metric metric)
{
    printf(
        "%s: %llu rows of %u %s, %s, graph degree %.1f, %s codes of %u bytes, stored as %s, %u a "
        "page of %u bytes\n",
        output, (unsigned long long)r->row_count, dim, element_name(element), metric_name(metric),
        r->mean_degree, code_kind_name(r->code), r->code_bytes, store_name(r->store),
        r->page_capacity, r->page_bytes);
    printf("  edges kept on pages: %.1f a row of %.1f that leave their page\n",
           (double)r->edges_kept / (double)r->row_count,
           (double)r->edges_given / (double)r->row_count);
    if (r->zero_vectors)
        printf("  %llu zero vectors%s\n", (unsigned long long)r->zero_vectors,
               metric == METRIC_COSINE ? " (their cosine similarity is 0 with everything)" : "");
}

/* A curve as one line: what was reached for the usual targets, and at how many reads. */
static void print_curve(const struct walk_curve *curve)
{
    static const float usual[] = {0.9f, 0.95f, 0.99f, 0.995f};

    if (curve->resident_share > 0)
        printf("    k %u, %.3g %% of the pages in memory:", curve->k,
               100 * (double)curve->resident_share);
    else
        printf("    k %u:", curve->k);
    for (uint32_t i = 0, shown = 0; i < curve->point_count; i++) {
        const struct walk_point *point = &curve->points[i];

        for (size_t u = 0; u < sizeof usual / sizeof usual[0]; u++)
            if (point->recall == usual[u])
                printf("%s %.4g -> %.4f at %.1f reads", shown++ ? "," : "", (double)point->recall,
                       (double)point->reached, (double)point->reads);
    }
    printf("\n");
}

static void print_facts(const struct field_facts *facts, uint64_t row_count)
{
    if (facts->trial_count)
        printf("  codes tried, on a sample:\n");
    for (uint32_t i = 0; i < facts->trial_count; i++)
        printf("    %s\n", facts->trials[i]);
    if (facts->tier_count) {
        printf("  pages of the rows that are asked for most come first, in tiers that end at");
        for (uint32_t i = 0; i < facts->tier_count; i++)
            printf("%s %.3g", i ? "," : "", 100 * (double)facts->tier_rows[i] / (double)row_count);
        printf(" %% of the rows\n");
    }
    if (!facts->calibration || !facts->calibration->curve_count) {
        printf("  no calibration: --recall goes by a rule of thumb\n");
        return;
    }
    printf("  recall reached for each target, with %u %s:\n", facts->calibration->query_count,
           facts->calibration->own_queries ? "queries of yours"
                                           : "rows that the layout did not know");
    for (uint32_t i = 0; i < facts->calibration->curve_count; i++)
        if (facts->calibration->curves[i].k == 10 &&
            facts->calibration->curves[i].resident_share < 1)
            print_curve(&facts->calibration->curves[i]);
    printf("    annd inspect shows all that was measured\n");
}

/* What the segment tells of itself, before it is published. */
static int facts_of(const char *folder, const char *name, struct segment **segment,
                    struct field_facts *facts, struct error *err)
{
    char path[FILE_PATH_MAX];

    if (file_path_join(path, folder, name, err) < 0 ||
        segment_open(vfs_posix(), path, segment, err) < 0)
        return -1;
    return field_facts_read(*segment, 0, facts, err);
}

static int build_into(const struct arguments *arguments, const char *folder,
                      const struct vector_source *source, struct segment_build_params *params,
                      struct pool *pool, struct job *job, struct segment_build_result *result,
                      struct error *err)
{
    const struct row_input_files files = {
        option_text(arguments, "keys"), option_text(arguments, "attributes"),
        option_text(arguments, "schema"), option_text(arguments, "key-field"),
        option_text(arguments, "vector-field")};
    struct row_input rows = {0};
    int rc = -1;

    if (row_input_open(&files, vector_source_rows(source), vector_source_dim(source),
                       vector_source_type(source), folder, job, &rows, err) < 0)
        goto done;
    if (params->memory_bytes <= rows.memory_bytes) {
        error_set(err, ERR_BUDGET, "keys and attributes take %llu MiB, --memory grants %llu MiB",
                  (unsigned long long)rows.memory_bytes >> 20,
                  (unsigned long long)params->memory_bytes >> 20);
        goto done;
    }
    params->memory_bytes -= rows.memory_bytes;
    if (segment_build(vfs_posix(), folder, source, &rows.rows, params, pool, job, result, err) < 0)
        goto done;
    const char *name = result->name;

    rc = index_directory_publish(vfs_posix(), folder, rows.schema, &name, 1, err);
done:
    row_input_release(&rows);
    return rc;
}

/* The user's own queries to calibrate with; they are part of what the build holds in memory. */
static int calibrate_read(const char *path, const struct vector_source *source,
                          struct queries *queries, struct segment_build_params *params,
                          struct error *err)
{
    if (queries_read(path, 0, queries, err) < 0)
        return -1;
    if (queries->dim != vector_source_dim(source))
        return error_set(err, ERR_INVALID, "%s has %u dimensions, %s has %u", path, queries->dim,
                         vector_source_name(source), vector_source_dim(source));
    uint64_t bytes = (uint64_t)queries->count * queries->dim * sizeof *queries->vectors;

    if (params->memory_bytes <= bytes)
        return error_set(
            err, ERR_BUDGET, "the queries of %s take %llu MiB, --memory grants %llu MiB", path,
            (unsigned long long)bytes >> 20, (unsigned long long)params->memory_bytes >> 20);
    params->memory_bytes -= bytes;
    params->calibrate_vectors = queries->vectors;
    params->calibrate_count = queries->count;
    return 0;
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *input = arguments->positional[0], *output = option_text(arguments, "output");
    const char *query_path = option_text(arguments, "calibrate");
    char clean[FILE_PATH_MAX], folder[FILE_PATH_MAX], parent[FILE_PATH_MAX];
    struct segment_build_params params = {.alpha = 1.2f, .keep_originals = true};
    struct segment_build_result result;
    struct vector_source *source = NULL;
    struct queries queries = {0};
    struct segment *segment = NULL;
    struct field_facts facts = {0};
    struct pool *pool = NULL;
    struct job *job = NULL;
    bool made = false;
    int rc = -1;

    if (!output) {
        fprintf(stderr, "annd: annd build needs --output DIR\n");
        return EXIT_USAGE;
    }
    if (snprintf(clean, sizeof clean, "%s", output) >= (int)sizeof clean - 8)
        return error_set(err, ERR_INVALID, "the path of --output is too long");
    for (size_t n = strlen(clean); n > 1 && clean[n - 1] == '/'; n--)
        clean[n - 1] = 0;
    snprintf(folder, sizeof folder, "%.4080s.tmp", clean);
    file_path_folder(parent, clean);
    if (file_exists(vfs_posix(), clean)) {
        error_set(err, ERR_EXISTS, "%s is there already", clean);
        error_remedy(err, "choose another --output, or remove it first");
        return -1;
    }
    params.store = (uint32_t)store_of(option_text(arguments, "store"));
    params.code_bytes = option_u32(arguments, "code-bytes");
    params.max_degree = option_u32(arguments, "max-degree");
    params.build_list = option_u32(arguments, "build-list");
    params.seed = option_u64(arguments, "seed");
    params.keep_originals = !option_flag(arguments, "no-originals");
    params.own_distortion = choice_of(option_text(arguments, "own-distortion"));
    params.serve_memory_bytes = option_u64(arguments, "serve-memory");
    params.graph_path = option_text(arguments, "graph");
    params.memory_bytes = option_u64(arguments, "memory");
    if (!params.memory_bytes)
        params.memory_bytes = memory_default();
    if (metric_parse(option_text(arguments, "metric"), &params.metric, err) < 0 ||
        code_kind_parse(option_text(arguments, "code"), &params.code, err) < 0 ||
        vector_source_open(vfs_posix(), input, &source, err) < 0 ||
        pool_new(option_u32(arguments, "threads"), &pool, err) < 0 ||
        (query_path && calibrate_read(query_path, source, &queries, &params, err) < 0))
        goto done;

    /* Refusals that need no work come first. */
    uint64_t needed;
    char *sum = NULL;

    if (segment_build_plan(source, &params, pool_workers(pool), &needed, &sum, err) < 0)
        goto done;
    if (needed > params.memory_bytes) {
        error_set(err, ERR_BUDGET,
                  "building %s needs %llu MiB of memory (%s); --memory grants %llu MiB", input,
                  (unsigned long long)needed >> 20, sum,
                  (unsigned long long)params.memory_bytes >> 20);
        error_remedy(err, "grant more, or lower --max-degree (now %u)", params.max_degree);
        free(sum);
        goto done;
    }
    free(sum);
    if (space_check(parent, source, params.keep_originals, err) < 0)
        goto done;
    job = progress_job(arguments, err);
    if (!job || file_remove_all(vfs_posix(), folder, err) < 0 ||
        file_mkdir(vfs_posix(), folder, err) < 0)
        goto done;
    made = true;
    if (build_into(arguments, folder, source, &params, pool, job, &result, err) < 0 ||
        facts_of(folder, result.name, &segment, &facts, err) < 0 ||
        file_dirsync(vfs_posix(), folder, err) < 0 ||
        file_rename(vfs_posix(), folder, clean, err) < 0 ||
        file_dirsync(vfs_posix(), parent, err) < 0)
        goto done;
    made = false;
    print_result(clean, &result, vector_source_dim(source), vector_source_type(source),
                 params.metric);
    print_facts(&facts, result.row_count);
    rc = 0;
done:
    progress_end(job);
    field_facts_release(&facts);
    segment_close(segment);
    queries_release(&queries);
    if (made)
        file_remove_all(vfs_posix(), folder, NULL);
    vector_source_close(source);
    pool_free(pool);
    return rc;
}

static const struct option options[] = {
    {"output", OPTION_TEXT, "DIR", NULL, NULL, "index directory to make", 0, 0},
    {"metric", OPTION_TEXT, "METRIC", "l2", "l2|ip|cosine", "distance", 0, 0},
    {"keys", OPTION_TEXT, "FILE", NULL, NULL,
     "keys: text, one a line, or integer .npy; by default the row number", 0, 0},
    {"attributes", OPTION_TEXT, "FILE", NULL, NULL, "a JSON object a row", 0, 0},
    {"schema", OPTION_TEXT, "FILE", NULL, NULL, "fields of the collection, as JSON", 0, 0},
    {"key-field", OPTION_TEXT, "NAME", NULL, NULL, "name of the key, by default id", 0, 0},
    {"vector-field", OPTION_TEXT, "NAME", NULL, NULL, "name of the vector, by default vector", 0,
     0},
    {"code", OPTION_TEXT, "KIND", "auto", "auto|pq|opq|scalar",
     "codes kept in memory; auto tries all", 0, 0},
    {"own-distortion", OPTION_TEXT, "WHETHER", "auto", "auto|yes|no",
     "a byte of each code says how far off it is; auto tries both", 0, 0},
    {"code-bytes", OPTION_NUMBER, "N", NULL, NULL,
     "bytes of codes a row, by default dim/4 within 16..192", 1, 32767},
    {"store", OPTION_TEXT, "FORM", "auto", "auto|f32|f16|8bit",
     "vectors on the pages; auto: f16 for floats, integers as they are", 0, 0},
    {"no-originals", OPTION_FLAG, NULL, NULL, NULL,
     "do not keep the original floats: vectors cannot be given back", 0, 0},
    {"max-degree", OPTION_NUMBER, "R", "64", NULL, "edges a node at most", 4, 256},
    {"build-list", OPTION_NUMBER, "L", "100", NULL, "candidates per insertion", 4, 4096},
    {"serve-memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "memory it will be searched with: the rows asked for most that fit into it get the first "
     "pages",
     1, UINT64_MAX},
    {"calibrate", OPTION_TEXT, "FILE", NULL, NULL,
     "queries like those to come, to measure what --recall takes; by default rows are used", 0, 0},
    {"graph", OPTION_TEXT, "FILE", NULL, NULL,
     "take the graph from FILE if it is there and fits, else make it and keep it there", 0, 0},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of the build, by default 90 % of the machine", 1, UINT64_MAX},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default all cores", 1, 1024},
    {"seed", OPTION_NUMBER, "N", "1", NULL, "same input, parameters and seed: same bytes", 0, 0},
    PROGRESS_OPTION,
    {0},
};

const struct command command_build = {
    .name = "build",
    .positional = "INPUT",
    .summary = "build an index from a vector file",
    .examples = "  annd build base.u8bin --output idx\n"
                "  annd build base.fbin --metric cosine --attributes rows.jsonl --output idx\n"
                "  annd build base.fbin --serve-memory 2G --calibrate queries.fbin --output idx\n",
    .options = options,
    .run = run,
};
