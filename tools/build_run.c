/* How it works: the record of what was asked is durable before anything else is
 * (storage/journal.h), so whatever ends a run, the folder says what it is, and the next run does
 * the same work again from the last checkpoint. The index becomes one by its MANIFEST; a run that
 * finds that there has only to clear away the journal. */
#include "tools/build_run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index/index_directory.h"
#include "tools/build_record.h"
#include "tools/field_facts.h"
#include "tools/progress.h"
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

static void set_builder(struct segment_build_params *params, const char *name)
{
    params->builder = !strcmp(name, "batch")    ? GRAPH_BUILDER_BATCH
                      : !strcmp(name, "insert") ? GRAPH_BUILDER_INSERT
                                                : GRAPH_BUILDER_AUTO;
}

uint64_t build_run_memory_default(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) / 10 * 9;
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

int build_run_folder(struct build_run *run, const char *path, struct error *err)
{
    if (snprintf(run->folder, sizeof run->folder, "%s", path) >= (int)sizeof run->folder - 128)
        return error_set(err, ERR_INVALID, "the path of the index directory is too long");
    for (size_t n = strlen(run->folder); n > 1 && run->folder[n - 1] == '/'; n--)
        run->folder[n - 1] = 0;
    return 0;
}

int build_run_params(const struct arguments *asked, struct segment_build_params *params,
                     struct error *err)
{
    *params = (struct segment_build_params){.alpha = 1.2f};
    params->store = (uint32_t)store_of(option_text(asked, "store"));
    params->code_bytes = option_u32(asked, "code-bytes");
    params->max_degree = option_u32(asked, "max-degree");
    params->build_list = option_u32(asked, "build-list");
    params->seed = option_u64(asked, "seed");
    params->keep_originals = !option_flag(asked, "no-originals");
    params->own_distortion = choice_of(option_text(asked, "own-distortion"));
    params->serve_memory_bytes = option_u64(asked, "serve-memory");
    set_builder(params, option_text(asked, "builder"));
    if (metric_parse(option_text(asked, "metric"), &params->metric, err) < 0)
        return -1;
    return code_kind_parse(option_text(asked, "code"), &params->code, err);
}

int build_run_prepare(struct build_run *run, uint32_t threads, uint64_t memory_bytes,
                      struct error *err)
{
    const struct arguments *asked = run->asked;
    const char *query_path = option_text(asked, "calibrate");
    struct segment_build_params *params = &run->params;
    struct row_shape shape;
    int rc = -1;

    if (build_run_params(asked, params, err) < 0)
        goto done;
    run->memory_bytes = memory_bytes ? memory_bytes : build_run_memory_default();
    params->memory_bytes = run->memory_bytes;
    if (vector_source_open(vfs_posix(), asked->positional[0], &run->source, err) < 0 ||
        pool_new(threads, &run->pool, err) < 0 ||
        (query_path && calibrate_read(query_path, run->source, &run->queries, params, err) < 0) ||
        segment_build_params_check(run->source, params, err) < 0)
        goto done;
    row_shape_init(&shape, params->metric, vector_source_type(run->source),
                   vector_source_dim(run->source));
    build_plan_make(&shape, vector_source_rows(run->source), params, pool_workers(run->pool),
                    &run->plan);
    /* The queries are held all the time. */
    uint64_t queries = run->memory_bytes - params->memory_bytes;

    run->plan.memory_bytes += queries;
    for (uint32_t i = 0; i < run->plan.phase_count; i++)
        run->plan.phases[i].bytes += queries;
    if (build_plan_check(&run->plan, asked->positional[0], run->memory_bytes, err) < 0)
        goto done;
    rc = 0;
done:
    return rc;
}

void build_run_release(struct build_run *run)
{
    progress_end(run->job);
    journal_close(run->journal);
    queries_release(&run->queries);
    vector_source_close(run->source);
    pool_free(run->pool);
}

int build_run_is_whole(const char *folder, struct error *err)
{
    char path[FILE_PATH_MAX];
    char **names;
    uint32_t count;

    if (file_path_join(path, folder, "MANIFEST", err) < 0)
        return -1;
    if (!file_exists(vfs_posix(), path))
        return 0;
    if (index_directory_files(vfs_posix(), folder, &names, &count, err) < 0)
        return -1;
    file_names_free(names, count);
    return 1;
}

/* The one call of segment_build(). */
static int build_step(struct build_run *run, const struct row_input *rows,
                      struct segment_build_result *result, struct error *err)
{
    return segment_build(vfs_posix(), run->folder, run->source, &rows->rows, &run->params,
                         run->journal, run->pool, run->job, result, err);
}

static int make_index(struct build_run *run, struct segment_build_result *result, struct error *err)
{
    const struct arguments *asked = run->asked;
    const struct row_input_files files = {
        option_text(asked, "keys"), option_text(asked, "attributes"), option_text(asked, "schema"),
        option_text(asked, "key-field"), option_text(asked, "vector-field")};
    char scratch[FILE_PATH_MAX], folder[FILE_PATH_MAX];
    struct row_input rows = {0};
    const char *name = result->name;
    int rc = -1;

    if (journal_scratch_path(run->journal, "attributes.scratch", scratch, err) < 0)
        goto done;
    file_path_folder(folder, scratch);
    if (row_input_open(&files, vector_source_rows(run->source), vector_source_dim(run->source),
                       vector_source_type(run->source), folder, run->job, &rows, err) < 0)
        goto done;
    if (run->params.memory_bytes <= rows.memory_bytes) {
        error_set(err, ERR_BUDGET, "keys and attributes take %llu MiB, --memory grants %llu MiB",
                  (unsigned long long)rows.memory_bytes >> 20,
                  (unsigned long long)run->params.memory_bytes >> 20);
        goto done;
    }
    run->params.memory_bytes -= rows.memory_bytes;
    if (build_step(run, &rows, result, err) < 0 ||
        build_record_check(journal_asked(run->journal), err) < 0 ||
        index_directory_publish(vfs_posix(), run->folder, rows.schema, &name, 1, err) < 0)
        goto done;
    rc = 0;
done:
    row_input_release(&rows);
    return rc;
}

/* Whether the input or what was asked is at fault: the same run would fail again. */
static bool is_own_fault(enum error_code code)
{
    return code == ERR_INVALID || code == ERR_NOT_FOUND || code == ERR_EXISTS ||
           code == ERR_UNSUPPORTED || code == ERR_BUDGET;
}

/* Closes the journal and says what is left and how to go on. */
static void end_failed(struct build_run *run, bool fresh, struct error *err)
{
    bool has_checkpoint = manifest_count(journal_state(run->journal)) > 0;
    double age = journal_commit_age(run->journal);
    enum error_code code = err->code;

    progress_journal(NULL);
    journal_close(run->journal);
    run->journal = NULL;
    if (fresh && is_own_fault(code)) {
        struct error left = ERROR_INIT;

        if (journal_discard(vfs_posix(), run->folder, &left) < 0)
            error_remedy(err, "annd discard %s removes what was begun", run->folder);
        return;
    }
    if (code == ERR_CANCELLED) {
        error_clear(err);
        if (has_checkpoint)
            error_set(err, code, "stopped; %s keeps all that was done until %.0f s ago",
                      run->folder, age);
        else
            error_set(err, code,
                      "stopped before the first checkpoint; %s keeps what was asked for, and going "
                      "on starts the work again",
                      run->folder);
        error_remedy(err, "annd resume %s goes on, annd discard %s gives up", run->folder,
                     run->folder);
        return;
    }
    if (code == ERR_CORRUPT)
        error_remedy(err, "annd discard %s, then build again: what was made there cannot be used",
                     run->folder);
    else if (is_own_fault(code) && code != ERR_BUDGET)
        error_remedy(err, "annd discard %s, then build again", run->folder);
    else
        error_remedy(err,
                     "%sannd resume %s goes on from what is saved there, annd discard %s gives up",
                     code == ERR_NO_SPACE                      ? "make room on the disk; "
                     : code == ERR_BUDGET || code == ERR_NOMEM ? "grant memory with --memory; "
                                                               : "",
                     run->folder, run->folder);
}

int build_run_work(struct build_run *run, bool fresh, struct error *err)
{
    struct segment_build_result result;
    struct segment *segment = NULL;
    struct field_facts facts = {0};
    int rc = -1;

    progress_memory_limit(run->memory_bytes);
    progress_journal(run->journal);
    memset(&result, 0, sizeof result);
    if (make_index(run, &result, err) < 0 ||
        facts_of(run->folder, result.name, &segment, &facts, err) < 0)
        goto done;
    job_finish(run->job);
    progress_journal(NULL);
    if (journal_finish(run->journal, err) < 0)
        goto done;
    print_result(run->folder, &result, vector_source_dim(run->source),
                 vector_source_type(run->source), run->params.metric);
    print_facts(&facts, result.row_count);
    rc = 0;
done:
    if (rc < 0)
        end_failed(run, fresh, err);
    field_facts_release(&facts);
    segment_close(segment);
    return rc;
}
