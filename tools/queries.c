#include "tools/queries.h"

#include <ctype.h>
#include <stdlib.h>

int queries_read(const char *path, uint32_t dim, struct queries *out, struct error *err)
{
    struct vector_source *source = NULL;
    int rc = -1;

    *out = (struct queries){0};
    if (vector_source_open(vfs_posix(), path, &source, err) < 0)
        return -1;
    uint64_t rows = vector_source_rows(source);

    out->dim = vector_source_dim(source);
    if (dim && out->dim != dim) {
        error_set(err, ERR_INVALID, "%s has %u dimensions, the index has %u", path, out->dim, dim);
        goto done;
    }
    if (rows > 10000000) {
        error_set(err, ERR_INVALID, "%s has %llu queries; at most 10,000,000 are taken at once",
                  path, (unsigned long long)rows);
        goto done;
    }
    out->count = (uint32_t)rows;
    out->vectors = malloc(rows * out->dim * sizeof *out->vectors);
    if (!out->vectors) {
        error_set(err, ERR_NOMEM, "no memory for %llu queries", (unsigned long long)rows);
        goto done;
    }
    if (vector_source_read_f32(source, 0, rows, out->vectors, err) < 0)
        goto done;
    if (vector_check_finite(out->vectors, 0, rows, out->dim, err) < 0) {
        error_prefix(err, "%s", path);
        goto done;
    }
    rc = 0;
done:
    vector_source_close(source);
    if (rc < 0)
        queries_release(out);
    return rc;
}

void queries_release(struct queries *queries)
{
    free(queries->vectors);
    *queries = (struct queries){0};
}

/* "0.9,0.95" to numbers between 0 and 1. */
static int recalls_parse(const char *text, struct search_target *out, uint32_t *count,
                         struct error *err)
{
    uint32_t room = *count;
    const char *p = text;

    *count = 0;
    do {
        char *end;
        double value = strtod(p, &end);

        if (!isdigit((unsigned char)*p) || (*end && *end != ',') || !(value > 0 && value < 1)) {
            error_set(err, ERR_INVALID, "--recall takes numbers above 0 and below 1%s; not '%s'",
                      room > 1 ? " with commas, such as 0.9,0.95" : ", such as 0.95", text);
            if (end > p && value == 1)
                error_remedy(err, "0.999 comes near; a --search-list is read to its end");
            return -1;
        }
        if (*count == room)
            return error_set(err, ERR_INVALID, "--recall takes at most %u number%s, not '%s'", room,
                             room == 1 ? "" : "s", text);
        out[(*count)++] = (struct search_target){.recall = value};
        p = *end ? end + 1 : NULL;
    } while (p);
    return 0;
}

int search_targets_parse(const struct arguments *arguments, struct search_target *out,
                         uint32_t *count, struct error *err)
{
    uint32_t lists[SEARCH_TARGETS_MAX];
    bool by_recall = option_given(arguments, "recall");

    if (by_recall && option_given(arguments, "search-list")) {
        error_set(err, ERR_INVALID, "annd %s takes --recall or --search-list, not both",
                  arguments->command->name);
        error_remedy(err, "--recall lets the index choose how far to search");
        return -1;
    }
    if (by_recall)
        return recalls_parse(option_text(arguments, "recall"), out, count, err);
    if (!option_given(arguments, "search-list")) {
        *count = 0;
        return 0;
    }
    if (option_list(arguments, "search-list", 1, SEARCH_LIST_MAX, lists, count, err) < 0)
        return -1;
    if (*count == 0)
        return error_set(err, ERR_INVALID, "--search-list is empty; it takes a number such as 100");
    for (uint32_t i = 0; i < *count; i++)
        out[i] = (struct search_target){.search_list = lists[i]};
    return 0;
}

struct walk_rule search_target_rule(const struct search_target *target,
                                    const struct disk_index *index, uint32_t k,
                                    float *reads_expected)
{
    struct walk_rule rule;

    if (reads_expected)
        *reads_expected = 0;
    if (target->search_list)
        walk_rule_for_list(index->calibration, target->search_list, k, &rule);
    else
        walk_rule_for_recall(index->calibration, target->recall, k,
                             disk_index_resident_share(index), &rule, reads_expected);
    /* What an engine can be sized for; no table asks for more. */
    if (rule.search_list > SEARCH_LIST_MAX)
        rule.search_list = SEARCH_LIST_MAX;
    if (rule.cells > DISK_SEARCH_CELLS_MAX)
        rule.cells = DISK_SEARCH_CELLS_MAX;
    return rule;
}

void search_limits_raise(struct disk_search_limits *limits, const struct disk_index *index,
                         const struct walk_rule *rule)
{
    uint32_t list = rule->search_list > limits->k_max ? rule->search_list : limits->k_max;

    if (list > limits->search_list_max)
        limits->search_list_max = list;
    if (rule->cells > limits->cells_max)
        limits->cells_max = rule->cells;
    disk_search_limits_raise(limits, index);
}
