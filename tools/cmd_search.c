/* annd search: the nearest rows of each query, from an index on disk. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "storage/base/json_writer.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/queries.h"

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

static int print_json(const struct answer *answers, uint32_t count, enum metric metric, bool lines,
                      struct error *err)
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
                         const char *form, struct error *err)
{
    char number[JSON_FLOAT_TEXT_BYTES];

    if (!strcmp(form, "json") || !strcmp(form, "jsonl"))
        return print_json(answers, count, metric, !strcmp(form, "jsonl"), err);
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
    }
    return 0;
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *query_path = option_text(arguments, "queries");
    uint32_t k = option_u32(arguments, "k"), list = option_u32(arguments, "search-list");
    struct index_directory *directory = NULL;
    struct search_engine *engine = NULL;
    struct reader *reader = NULL;
    struct queries queries = {0};
    struct search_task *tasks = NULL;
    struct search_hit *hits = NULL;
    struct found *found = NULL;
    struct answer *answers = NULL;
    uint64_t n = 0, total = 0;
    enum reader_backend backend;
    char reason[256];
    int rc = -1;

    if (!query_path) {
        fprintf(stderr, "annd: annd search needs --queries\n");
        return EXIT_USAGE;
    }
    reader_probe(reason);
    if (reader_backend_parse(option_text(arguments, "io"), &backend, err) < 0 ||
        index_directory_open(vfs_posix(), arguments->positional[0], option_u64(arguments, "memory"),
                             true, &directory, err) < 0)
        goto done;
    if (k > directory->row_count) {
        error_set(err, ERR_INVALID, "-k is %u; %s has %llu rows", k, arguments->positional[0],
                  (unsigned long long)directory->row_count);
        goto done;
    }
    list = list ? list : (k * 2 > 100 ? k * 2 : 100);
    list = list < k ? k : list > SEARCH_LIST_MAX ? SEARCH_LIST_MAX : list;
    const struct disk_index *first = directory->segments[0].fields[0];
    uint32_t segments = directory->segment_count;

    if (queries_read(query_path, first->dim, &queries, err) < 0)
        goto done;
    n = (uint64_t)queries.count * segments;
    tasks = calloc(n, sizeof *tasks);
    hits = malloc(n * k * sizeof *hits);
    found = calloc(n * k, sizeof *found);
    answers = calloc(queries.count, sizeof *answers);
    if (!tasks || !hits || !found || !answers) {
        error_set(err, ERR_NOMEM, "no memory for %u answers", queries.count);
        goto done;
    }
    struct search_engine_options options =
        queries_engine_options(first, option_u32(arguments, "threads"), 8, 4, list, k, backend);

    for (uint32_t s = 1; s < segments; s++) {
        const struct disk_index *index = directory->segments[s].fields[0];
        struct search_engine_options other =
            queries_engine_options(index, 1, 8, 4, list, k, backend);

        if (other.page_bytes_max > options.page_bytes_max)
            options.page_bytes_max = other.page_bytes_max;
        if (other.table_floats_max > options.table_floats_max)
            options.table_floats_max = other.table_floats_max;
        if (other.scratch_floats_max > options.scratch_floats_max)
            options.scratch_floats_max = other.scratch_floats_max;
    }
    if (search_engine_open(&options, &engine, err) < 0 ||
        reader_open(backend, 64, &reader, err) < 0)
        goto done;
    for (uint64_t i = 0; i < n; i++)
        tasks[i] = (struct search_task){.index = directory->segments[i % segments].fields[0],
                                        .query = queries.vectors + i / segments * queries.dim,
                                        .params = {.k = k, .search_list = list},
                                        .hits = hits + i * k};
    if (search_engine_run(engine, tasks, (uint32_t)n, err) < 0)
        goto done;
    for (uint64_t i = 0; i < n; i++) {
        struct answer *answer = &answers[i / segments];
        struct found *piece = found + total;

        if (tasks[i].error.code) {
            *err = tasks[i].error;
            goto done;
        }
        if (i % segments == 0)
            answer->found = piece;
        for (uint32_t h = 0; h < tasks[i].hit_count; h++)
            piece[h] = (struct found){&tasks[i].hits[h], (uint32_t)(i % segments), NULL};
        total += tasks[i].hit_count;
        answer->count += tasks[i].hit_count;
        if (!tasks[i].index->format.holds_keys &&
            text_keys_fetch(&directory->segments[i % segments], reader, piece, tasks[i].hit_count,
                            err) < 0)
            goto done;
    }
    for (uint32_t q = 0; q < queries.count; q++) {
        qsort(answers[q].found, answers[q].count, sizeof *answers[q].found, compare_found);
        answers[q].count = answers[q].count < k ? answers[q].count : k;
    }
    rc =
        print_answers(answers, queries.count, first->metric, option_text(arguments, "output"), err);
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
    {"search-list", OPTION_NUMBER, "N", NULL, NULL,
     "candidates kept: more find more and read more; by default 100 or 2k", 1, SEARCH_LIST_MAX},
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
                "  annd search idx --queries q.fbin -k 100 --search-list 300 --output jsonl\n",
    .options = options,
    .run = run,
};
