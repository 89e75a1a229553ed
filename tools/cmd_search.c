/* annd search: the nearest rows of each query, from an index on disk. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "storage/base/json_writer.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/queries.h"

#define RECALL_DEFAULT 0.95

/* One row of an answer. */
struct found {
    const struct search_hit *hit;
    uint32_t segment;
    char *text_key; /* NULL: the key is hit->key */
};

struct answer {
    struct found *found;
    uint32_t count;
};

/* What the answers were made with; for --explain. */
struct plan {
    struct search_target target;
    struct walk_rule rules[INDEX_SEGMENT_MAX];
    float reads_expected[INDEX_SEGMENT_MAX]; /* 0: not known */
    const struct search_task *tasks;         /* of query q: segment_count from q * segment_count */
    uint32_t segment_count;
    bool explain;
};

static int compare_found(const void *a, const void *b)
{
    const struct found *x = a, *y = b;

    if (x->hit->distance != y->hit->distance)
        return x->hit->distance < y->hit->distance ? -1 : 1;
    if (x->text_key && y->text_key)
        return strcmp(x->text_key, y->text_key);
    return (x->hit->key > y->hit->key) - (x->hit->key < y->hit->key);
}

/* Text keys are the first value of a row's record. */
static int text_keys_fetch(const struct index_segment *segment, struct reader *reader,
                           struct found *found, uint32_t count, struct error *err)
{
    uint32_t *positions = malloc((count ? count : 1) * sizeof *positions);
    struct rows_record *records = malloc((count ? count : 1) * sizeof *records);
    uint8_t *storage = NULL;
    int rc = -1;

    if (!positions || !records) {
        error_set(err, ERR_NOMEM, "no memory for %u keys", count);
        goto done;
    }
    for (uint32_t i = 0; i < count; i++)
        positions[i] = found[i].hit->position;
    if (rows_fetch(segment->rows, reader, positions, count, records, &storage, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        struct record_cursor cursor;
        struct value value;
        uint32_t field, name_bytes;
        const char *name;

        if (record_open(records[i].data, records[i].bytes, &cursor, err) < 0)
            goto done;
        if (record_next(&cursor, &field, &name, &name_bytes, &value, err) != 1 ||
            value.type != VALUE_TEXT) {
            error_set(err, ERR_CORRUPT, "%s: row position %u has no key",
                      segment_path(segment->segment), positions[i]);
            goto done;
        }
        found[i].text_key = strndup(value.text, value.text_bytes);
        if (!found[i].text_key) {
            error_set(err, ERR_NOMEM, "no memory for a key");
            goto done;
        }
    }
    rc = 0;
done:
    free(positions);
    free(records);
    free(storage);
    return rc;
}

static void print_csv(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        if (*text == '"')
            putchar('"');
        putchar(*text);
    }
    putchar('"');
}

static void write_key(struct json_writer *w, const struct found *f)
{
    if (f->text_key)
        json_string(w, f->text_key);
    else
        json_int64(w, f->hit->key);
}

/* ---- explain ---- */

/* What is left of the latency after the phases on the CPU. */
static double waited_us(const struct search_stats *t)
{
    double busy = (double)t->prepare_us + (double)t->seed_us + (double)t->score_us +
                  (double)t->expand_us + (double)t->exact_us;
    double waited = (double)t->latency_us - busy;

    return waited > 0 ? waited : 0;
}

static const char *reason_of(enum search_stop stop)
{
    switch (stop) {
    case STOP_GAIN:
        return "few better rows were to be expected";
    case STOP_LIST:
        return "every candidate in the list had been read";
    case STOP_READS:
        return "the limit of reads was reached";
    case STOP_NONE:
        break;
    }
    return "nothing was left to read";
}

static void write_number(struct json_writer *w, const char *name, double value)
{
    json_key(w, name);
    if (isfinite(value))
        json_float(w, (float)value);
    else
        json_null(w);
}

static void write_count(struct json_writer *w, const char *name, uint64_t value)
{
    json_key(w, name);
    json_uint64(w, value);
}

static void write_explain_segment(struct json_writer *w, const struct plan *plan, uint32_t segment,
                                  const struct search_stats *t)
{
    const struct walk_rule *rule = &plan->rules[segment];

    json_begin_object(w);
    json_key(w, "rule");
    json_begin_object(w);
    write_number(w, "recall_target", plan->target.recall > 0 ? plan->target.recall : (double)NAN);
    write_count(w, "search_list", rule->search_list);
    write_count(w, "cells", rule->cells);
    write_count(w, "patience", rule->patience);
    write_number(w, "gain", (double)rule->gain);
    json_end_object(w);
    write_number(w, "reads_expected",
                 plan->reads_expected[segment] > 0 ? (double)plan->reads_expected[segment]
                                                   : (double)NAN);
    write_count(w, "rounds", t->rounds);
    write_count(w, "reads", t->reads);
    write_count(w, "read_bytes", t->read_bytes);
    write_count(w, "resident_hits", t->resident_hits);
    write_count(w, "cells", t->cells);
    write_count(w, "scanned", t->scanned);
    write_count(w, "estimates", t->estimates);
    write_count(w, "expanded", t->expanded);
    write_count(w, "exact", t->exact);
    json_key(w, "stop");
    json_string(w, search_stop_name(t->stop));
    write_number(w, "gain", (double)t->gain);
    write_number(w, "latency_us", (double)t->latency_us);
    json_key(w, "time_us");
    json_begin_object(w);
    write_number(w, "prepare", (double)t->prepare_us);
    write_number(w, "seed", (double)t->seed_us);
    write_number(w, "score", (double)t->score_us);
    write_number(w, "expand", (double)t->expand_us);
    write_number(w, "exact", (double)t->exact_us);
    write_number(w, "wait", waited_us(t));
    json_end_object(w);
    json_end_object(w);
}

/* One object; of an index with several segments, each has its own within. */
static void write_explain(struct json_writer *w, const struct plan *plan, uint32_t query)
{
    const struct search_task *tasks = plan->tasks + (uint64_t)query * plan->segment_count;

    json_key(w, "explain");
    if (plan->segment_count == 1) {
        write_explain_segment(w, plan, 0, &tasks[0].stats);
        return;
    }
    json_begin_object(w);
    json_key(w, "segments");
    json_begin_array(w);
    for (uint32_t s = 0; s < plan->segment_count; s++)
        write_explain_segment(w, plan, s, &tasks[s].stats);
    json_end_array(w);
    json_end_object(w);
}

static void print_explain(const struct plan *plan, uint32_t query)
{
    char name[48] = "";

    for (uint32_t s = 0; s < plan->segment_count; s++) {
        const struct search_stats *t =
            &plan->tasks[(uint64_t)query * plan->segment_count + s].stats;
        const struct walk_rule *rule = &plan->rules[s];

        if (plan->segment_count > 1)
            snprintf(name, sizeof name, " segment %u:", s);
        printf("#%s rule: ", name);
        if (plan->target.recall > 0)
            printf("recall %.6g asked for: ", plan->target.recall);
        printf("list of %u, %u cells, ", rule->search_list, rule->cells);
        if (rule->gain > 0)
            printf("patience %u reads, gain below %.3g\n", rule->patience, (double)rule->gain);
        else
            printf("all of it read\n");
        printf("#%s read: %u pages of 4 KiB (%" PRIu64 " bytes) in %u rounds", name, t->reads,
               t->read_bytes, t->rounds);
        if (plan->reads_expected[s] > 0)
            printf(", expected %.1f", (double)plan->reads_expected[s]);
        printf("; %u pages from memory\n", t->resident_hits);
        printf("#%s computed: %u codes scanned in %u cells, %u neighbours estimated of %u nodes "
               "expanded, %u vectors scored\n",
               name, t->scanned, t->cells, t->estimates, t->expanded, t->exact);
        printf("#%s time: %.0f us: prepare %.0f, seed %.0f, score %.0f, expand %.0f, exact scores "
               "%.0f, waiting %.0f\n",
               name, (double)t->latency_us, (double)t->prepare_us, (double)t->seed_us,
               (double)t->score_us, (double)t->expand_us, (double)t->exact_us, waited_us(t));
        printf("#%s stopped (%s): %s", name, search_stop_name(t->stop), reason_of(t->stop));
        if (isfinite(t->gain))
            printf("; expected gain left %.3g hits", (double)t->gain);
        printf("\n");
    }
}

/* ---- answers ---- */

static int print_json(const struct answer *answers, uint32_t count, enum metric metric,
                      const struct plan *plan, bool lines, struct error *err)
{
    struct json_writer w;
    const char *text;
    size_t bytes;
    int rc = -1;

    json_writer_init(&w, (size_t)1 << 32);
    if (!lines)
        json_begin_array(&w);
    for (uint32_t q = 0; q < count; q++) {
        json_begin_object(&w);
        json_key(&w, "query");
        json_uint64(&w, q);
        json_key(&w, "hits");
        json_begin_array(&w);
        for (uint32_t i = 0; i < answers[q].count; i++) {
            const struct found *f = &answers[q].found[i];

            json_begin_object(&w);
            json_key(&w, "id");
            write_key(&w, f);
            json_key(&w, "distance");
            json_float(&w, search_score(metric, f->hit->distance));
            json_end_object(&w);
        }
        json_end_array(&w);
        if (plan->explain)
            write_explain(&w, plan, q);
        json_end_object(&w);
        if (lines) {
            if (json_writer_finish(&w, &text, &bytes, err) < 0)
                goto done;
            printf("%s\n", text);
            json_writer_reset(&w);
        }
    }
    if (!lines) {
        json_end_array(&w);
        if (json_writer_finish(&w, &text, &bytes, err) < 0)
            goto done;
        printf("%s\n", text);
    }
    rc = 0;
done:
    json_writer_release(&w);
    return rc;
}

static int print_answers(const struct answer *answers, uint32_t count, enum metric metric,
                         const struct plan *plan, const char *form, struct error *err)
{
    char number[JSON_FLOAT_TEXT_BYTES];

    if (!strcmp(form, "json") || !strcmp(form, "jsonl"))
        return print_json(answers, count, metric, plan, !strcmp(form, "jsonl"), err);
    if (!strcmp(form, "csv"))
        printf("query,rank,id,distance\n");
    if (!strcmp(form, "table"))
        printf("%7s %5s %20s  %s\n", "query", "rank", "id", "distance");
    for (uint32_t q = 0; q < count; q++) {
        for (uint32_t i = 0; i < answers[q].count; i++) {
            const struct found *f = &answers[q].found[i];
            char id[32];

            snprintf(id, sizeof id, "%" PRId64, f->hit->key);
            json_format_float(search_score(metric, f->hit->distance), number);
            if (!strcmp(form, "ids")) {
                printf("%s%s", i ? " " : "", f->text_key ? f->text_key : id);
            } else if (!strcmp(form, "csv")) {
                printf("%u,%u,", q, i + 1);
                if (f->text_key)
                    print_csv(f->text_key);
                else
                    printf("%s", id);
                printf(",%s\n", number);
            } else {
                printf("%7u %5u %20s  %s\n", q, i + 1, f->text_key ? f->text_key : id, number);
            }
        }
        if (!strcmp(form, "ids"))
            printf("\n");
        if (plan->explain)
            print_explain(plan, q);
    }
    return 0;
}

/* ---- the verb ---- */

/* Every answer's tasks have ended; gathers their rows, best first. */
static int gather(const struct index_directory *directory, struct reader *reader,
                  struct search_task *tasks, uint32_t queries, uint32_t k, struct found *found,
                  struct answer *answers, uint64_t *total, struct error *err)
{
    uint32_t segments = directory->segment_count;

    for (uint64_t i = 0; i < (uint64_t)queries * segments; i++) {
        struct answer *answer = &answers[i / segments];
        struct found *piece = found + *total;

        if (tasks[i].error.code) {
            *err = tasks[i].error;
            return -1;
        }
        if (i % segments == 0)
            answer->found = piece;
        for (uint32_t h = 0; h < tasks[i].hit_count; h++)
            piece[h] = (struct found){&tasks[i].hits[h], (uint32_t)(i % segments), NULL};
        *total += tasks[i].hit_count;
        answer->count += tasks[i].hit_count;
        if (!tasks[i].index->format.holds_keys &&
            text_keys_fetch(&directory->segments[i % segments], reader, piece, tasks[i].hit_count,
                            err) < 0)
            return -1;
    }
    for (uint32_t q = 0; q < queries; q++) {
        qsort(answers[q].found, answers[q].count, sizeof *answers[q].found, compare_found);
        answers[q].count = answers[q].count < k ? answers[q].count : k;
    }
    return 0;
}

static int usage(const struct error *err)
{
    fprintf(stderr, "annd: %s\n", err->message);
    return EXIT_USAGE;
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *query_path = option_text(arguments, "queries");
    const char *form = option_text(arguments, "output");
    uint32_t k = option_u32(arguments, "k"), target_count = 1;
    bool exact_scores = option_flag(arguments, "exact-scores");
    struct search_engine_options options = {.threads = option_u32(arguments, "threads"),
                                            .slots_per_thread = 8,
                                            .limits = {.k_max = k, .beam_width = 4}};
    struct index_directory *directory = NULL;
    struct search_engine *engine = NULL;
    struct reader *reader = NULL;
    struct queries queries = {0};
    struct search_task *tasks = NULL;
    struct search_hit *hits = NULL;
    struct found *found = NULL;
    struct answer *answers = NULL;
    struct plan plan = {.explain = option_flag(arguments, "explain")};
    uint64_t n = 0, total = 0;
    char reason[256];
    int rc = -1;

    if (!query_path)
        error_set(err, ERR_INVALID, "annd search needs --queries");
    else if (plan.explain && (!strcmp(form, "csv") || !strcmp(form, "ids")))
        error_set(err, ERR_INVALID,
                  "--explain has no place in --output %s; table, json and jsonl "
                  "have one",
                  form);
    if (err->code || search_targets_parse(arguments, &plan.target, &target_count, err) < 0)
        return usage(err);
    if (!target_count)
        plan.target = (struct search_target){.recall = RECALL_DEFAULT};
    reader_probe(reason);
    if (reader_backend_parse(option_text(arguments, "io"), &options.backend, err) < 0 ||
        index_directory_open(vfs_posix(), arguments->positional[0], option_u64(arguments, "memory"),
                             true, &directory, err) < 0)
        goto done;
    if (k > directory->row_count) {
        error_set(err, ERR_INVALID, "-k is %u; %s has %llu rows", k, arguments->positional[0],
                  (unsigned long long)directory->row_count);
        goto done;
    }
    const struct disk_index *first = directory->segments[0].fields[0];
    uint32_t segments = directory->segment_count;

    if (queries_read(query_path, first->dim, &queries, err) < 0)
        goto done;
    n = (uint64_t)queries.count * segments;
    if (n > UINT32_MAX) {
        error_set(err, ERR_INVALID, "%u queries in %u segments are too many at once", queries.count,
                  segments);
        n = 0;
        goto done;
    }
    tasks = calloc(n, sizeof *tasks);
    hits = malloc(n * k * sizeof *hits);
    found = calloc(n * k, sizeof *found);
    answers = calloc(queries.count, sizeof *answers);
    if (!tasks || !hits || !found || !answers) {
        error_set(err, ERR_NOMEM, "no memory for %u answers", queries.count);
        goto done;
    }
    for (uint32_t s = 0; s < segments; s++) {
        const struct disk_index *index = directory->segments[s].fields[0];

        plan.rules[s] = search_target_rule(&plan.target, index, k, &plan.reads_expected[s]);
        search_limits_raise(&options.limits, index, &plan.rules[s]);
    }
    plan.tasks = tasks;
    plan.segment_count = segments;
    if (search_engine_open(&options, &engine, err) < 0 ||
        reader_open(options.backend, 64, &reader, err) < 0)
        goto done;
    for (uint64_t i = 0; i < n; i++)
        tasks[i] = (struct search_task){.index = directory->segments[i % segments].fields[0],
                                        .query = queries.vectors + i / segments * queries.dim,
                                        .params = {.k = k,
                                                   .rule = plan.rules[i % segments],
                                                   .early_reads = true,
                                                   .exact_scores = exact_scores,
                                                   .explain = plan.explain},
                                        .hits = hits + i * k};
    /* Alone, so that the time a query takes is its own. */
    uint32_t together = plan.explain ? segments : (uint32_t)n;

    for (uint64_t i = 0; i < n; i += together)
        if (search_engine_run(engine, tasks + i, together, err) < 0)
            goto done;
    if (gather(directory, reader, tasks, queries.count, k, found, answers, &total, err) < 0)
        goto done;
    rc = print_answers(answers, queries.count, first->metric, &plan, form, err);
done:
    for (uint64_t i = 0; i < total; i++)
        free(found[i].text_key);
    search_engine_close(engine);
    reader_close(reader);
    index_directory_close(directory);
    queries_release(&queries);
    free(tasks);
    free(hits);
    free(found);
    free(answers);
    return rc;
}

static const struct option options[] = {
    {"queries", OPTION_TEXT, "FILE", NULL, NULL, "query vectors", 0, 0},
    {"k", OPTION_NUMBER, "N", "10", NULL, "neighbours per query", 1, SEARCH_LIST_MAX},
    {"recall", OPTION_TEXT, "R", NULL, NULL,
     "share of the true neighbours to aim at, by default 0.95; the index knows how far to search",
     0, 0},
    {"search-list", OPTION_NUMBER, "N", NULL, NULL,
     "in its place: candidates kept, all of them read: more find more and read more", 1,
     SEARCH_LIST_MAX},
    {"exact-scores", OPTION_FLAG, NULL, NULL, NULL,
     "score the answers from the original vectors, for k more reads", 0, 0},
    {"explain", OPTION_FLAG, NULL, NULL, NULL,
     "say after each answer what was read, computed and waited for, and why it stopped", 0, 0},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of what stays resident, by default what must be", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "search threads, by default all cores", 1, 256},
    {"io", OPTION_TEXT, "HOW", "auto", "auto|uring|pread", "reader backend", 0, 0},
    {"output", OPTION_TEXT, "FORM", "table", "table|json|jsonl|csv|ids", "form of the answer", 0,
     0},
    {0},
};

const struct command command_search = {
    .name = "search",
    .positional = "DIR",
    .summary = "find the nearest rows of queries in an index",
    .examples = "  annd search idx --queries q.fbin -k 10\n"
                "  annd search idx --queries q.fbin --recall 0.99 --explain\n"
                "  annd search idx --queries q.fbin -k 100 --search-list 300 --output jsonl\n",
    .options = options,
    .run = run,
};
