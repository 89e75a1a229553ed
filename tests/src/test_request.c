#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/request.h"

static struct schema *example(bool dynamic)
{
    static const char text[] =
        "{\"enableDynamicField\":%s,\"fields\":["
        "{\"fieldName\":\"id\",\"dataType\":\"Int64\",\"isPrimary\":true},"
        "{\"fieldName\":\"path\",\"dataType\":\"VarChar\",\"elementTypeParams\":{\"max_length\":9}}"
        ","
        "{\"fieldName\":\"exif\",\"dataType\":\"JSON\"},"
        "{\"fieldName\":\"a\",\"dataType\":\"FloatVector\",\"elementTypeParams\":{\"dim\":4}},"
        "{\"fieldName\":\"b\",\"dataType\":\"FloatVector\",\"elementTypeParams\":{\"dim\":4}}]}";
    struct schema *schema = NULL;
    struct error err = ERROR_INIT;
    char json[1024];

    snprintf(json, sizeof json, text, dynamic ? "true" : "false");
    if (schema_parse(json, strlen(json), "test", &schema, &err) < 0)
        fail_msg("%s", err.message);
    return schema;
}

static void test_every_failure_has_a_row_and_every_error_a_failure(void **state)
{
    (void)state;
    for (int code = FAILURE_NONE + 1; code < FAILURE_COUNT; code++) {
        assert_true(failure_row(code)->milvus_code != 0);
        assert_true(failure_row(code)->http_status >= 200);
    }
    for (int code = ERR_NONE + 1; code < ERR_COUNT; code++) {
        struct error err = {.code = code, .message = "/secret/path: broken\n  to mend: x"};
        struct failure failure = {0};

        assert_int_equal(failure_from_error(&failure, &err), -1);
        assert_true(failure.code != FAILURE_NONE && failure.message[0] != '\0');
        assert_null(strchr(failure.message, '\n'));
        if (code == ERR_CORRUPT || code == ERR_IO || code == ERR_INTERNAL)
            assert_null(strstr(failure.message, "secret"));
    }
}

static enum failure_code window(uint32_t queries, int32_t limit, int32_t offset)
{
    struct search_request request;
    struct failure failure = {0};

    search_request_init(&request);
    request.query_count = queries;
    request.limit = limit;
    request.offset = offset;
    request_check_window(&request, &failure);
    return failure.code;
}

static void test_the_result_window_is_bounded(void **state)
{
    (void)state;
    assert_int_equal(window(1, 100, 0), FAILURE_NONE);
    assert_int_equal(window(1, 16384, 0), FAILURE_NONE);
    assert_int_equal(window(1, 16383, 1), FAILURE_NONE);
    assert_int_equal(window(0, 1, 0), FAILURE_OTHER);
    assert_int_equal(window(16385, 1, 0), FAILURE_OTHER);
    assert_int_equal(window(1, 0, 0), FAILURE_OTHER);
    assert_int_equal(window(1, 16385, 0), FAILURE_OTHER);
    assert_int_equal(window(1, 16384, 1), FAILURE_OTHER);
    assert_int_equal(window(1, 1, -1), FAILURE_OTHER);
    assert_int_equal(window(16384, 100, 0), FAILURE_OTHER);
    assert_int_equal(window(1, INT32_MAX, INT32_MAX), FAILURE_OTHER);
}

static uint32_t list_of(struct search_tuning tuning, uint32_t topk)
{
    struct search_effort effort;

    request_search_effort(&tuning, topk, false, &effort);
    assert_true(effort.recall_target == 0);
    return effort.search_list;
}

static void test_search_lists_follow_the_parameters_of_other_indexes(void **state)
{
    (void)state;
    assert_int_equal(list_of((struct search_tuning){0}, 10), 100);
    assert_int_equal(list_of((struct search_tuning){0}, 100), 200);
    assert_int_equal(list_of((struct search_tuning){.search_list = 30, .ef = 99}, 10), 30);
    assert_int_equal(list_of((struct search_tuning){.ef = 5}, 10), 10);
    assert_int_equal(list_of((struct search_tuning){.nprobe = 16}, 10), 64);
    assert_int_equal(list_of((struct search_tuning){.nprobe = 16, .level = 9}, 10), 64);
    assert_int_equal(list_of((struct search_tuning){.ef = UINT32_MAX}, 1), SEARCH_LIST_MAX);
}

static void test_recall_targets_come_from_the_request_a_level_or_the_calibration(void **state)
{
    struct search_effort effort;
    double last = 0.5;

    (void)state;
    request_search_effort(&(struct search_tuning){.recall_target = 0.8}, 10, false, &effort);
    assert_true(effort.recall_target == 0.8 && effort.search_list == 0);
    assert_string_equal(effort.given_by, "recall_target");
    for (uint32_t level = 1; level <= 10; level++) {
        request_search_effort(&(struct search_tuning){.level = level}, 10, false, &effort);
        assert_true(effort.recall_target > last && effort.recall_target <= REQUEST_RECALL_MAX);
        assert_string_equal(effort.given_by, "level");
        last = effort.recall_target;
    }
    request_search_effort(&(struct search_tuning){0}, 10, true, &effort);
    assert_true(effort.recall_target == REQUEST_RECALL_DEFAULT && effort.search_list == 0);
    assert_string_equal(effort.given_by, "default");
    request_search_effort(&(struct search_tuning){.search_list = 50}, 10, true, &effort);
    assert_true(effort.recall_target == 0 && effort.search_list == 50);
}

static void test_what_is_not_supported_is_refused(void **state)
{
    struct search_request request;
    struct failure failure = {0};
    const char *names[] = {"_default", "other"};
    struct name_list partitions = {.names = names, .count = 1, .given = true};

    (void)state;
    search_request_init(&request);
    request.filter = " \n";
    assert_int_equal(request_check_supported(&request, &failure), 0);
    request.filter = "id > 0";
    request_check_supported(&request, &failure);
    assert_int_equal(failure.code, FAILURE_UNIMPLEMENTED);
    request.filter = NULL;
    request.grouping_field = "path";
    failure = (struct failure){0};
    request_check_supported(&request, &failure);
    assert_int_equal(failure.code, FAILURE_UNIMPLEMENTED);
    request.grouping_field = NULL;
    request.tuning.range = "radius";
    failure = (struct failure){0};
    request_check_supported(&request, &failure);
    assert_int_equal(failure.code, FAILURE_UNIMPLEMENTED);
    failure = (struct failure){0};
    assert_int_equal(request_check_partitions(&partitions, &failure), 0);
    partitions.count = 2;
    request_check_partitions(&partitions, &failure);
    assert_int_equal(failure.code, FAILURE_OTHER);
    failure = (struct failure){0};
    assert_int_equal(request_check_consistency("Strong", &failure), 0);
    request_check_consistency("STRONG", &failure);
    assert_int_equal(failure.code, FAILURE_INVALID_PARAMETER);
}

static void test_the_vector_field_is_named_or_the_only_one(void **state)
{
    struct schema *schema = example(true);
    struct failure failure = {0};
    uint32_t number = 9;

    (void)state;
    assert_int_equal(request_vector_field(schema, "b", &number, &failure), 0);
    assert_int_equal(number, 1);
    request_vector_field(schema, NULL, &number, &failure);
    assert_int_equal(failure.code, FAILURE_JSON);
    assert_non_null(strstr(failure.message, "multiple vector fields: [a, b"));
    failure = (struct failure){0};
    request_vector_field(schema, "path", &number, &failure);
    assert_non_null(strstr(failure.message, "cannot find a vector field named: path"));
    schema_free(schema);
}

static enum failure_code plan(bool dynamic, const char *name, struct output_plan *out)
{
    struct schema *schema = example(dynamic);
    struct name_list names = {.names = &name, .count = name != NULL, .given = name != NULL};
    struct failure failure = {0};
    struct arena arena;

    arena_init(&arena, 1 << 20);
    output_plan_make(schema, &names, name == NULL, &arena, out, &failure);
    if (out->dynamic_count == 1)
        assert_string_equal(out->dynamic[0], "k");
    arena_release(&arena);
    schema_free(schema);
    return failure.code;
}

static void test_output_fields_are_planned_as_the_contract_says(void **state)
{
    struct output_plan out;

    (void)state;
    assert_int_equal(plan(true, "path", &out), FAILURE_NONE);
    assert_true(out.fields[0] && out.fields[1] && !out.fields[3] && out.records && !out.vectors);
    assert_int_equal(plan(true, "*", &out), FAILURE_NONE);
    assert_true(out.fields[2] && out.fields[3] && out.fields[4] && out.all_dynamic && out.vectors);
    assert_int_equal(plan(true, NULL, &out), FAILURE_NONE);
    assert_true(out.all_dynamic && out.vectors);
    assert_int_equal(plan(false, "id", &out), FAILURE_NONE);
    assert_true(out.fields[0] && !out.records && !out.vectors);
    assert_int_equal(plan(true, " k ", &out), FAILURE_NONE);
    assert_int_equal(out.dynamic_count, 1);
    assert_int_equal(plan(true, "$meta[\"k\"]", &out), FAILURE_NONE);
    assert_int_equal(out.dynamic_count, 1);
    assert_int_equal(plan(true, "$meta", &out), FAILURE_NONE);
    assert_true(out.all_dynamic && !out.fields[1]);
    assert_int_equal(plan(true, "exif[\"iso\"]", &out), FAILURE_OTHER);
    assert_int_equal(plan(false, "k", &out), FAILURE_OTHER);
}

static void test_booleans_in_headers_have_six_spellings_each(void **state)
{
    (void)state;
    assert_true(request_parse_bool("T", false));
    assert_false(request_parse_bool("False", true));
    assert_true(request_parse_bool("yes", true));
    assert_true(request_parse_bool(NULL, true));
    assert_false(request_parse_bool("", false));
}

static void test_log_lines_cannot_be_broken_by_what_they_quote(void **state)
{
    char line[LOG_LINE_BYTES_MAX + 1];
    char text[4 * LOG_LINE_BYTES_MAX];
    size_t bytes;

    (void)state;
    bytes = log_format_line(line, INT64_C(1767225600123), LOG_LEVEL_WARNING,
                            "a\r\nb\x1b[31m\x7f \xc3\xa9 \xff \xc2\x9b \\");
    line[bytes] = '\0';
    assert_string_equal(line, "2026-01-01T00:00:00.123Z WARN  a\\x0d\\x0ab\\x1b[31m\\x7f \xc3\xa9 "
                              "\\xff \\xc2\\x9b \\x5c\n");
    memset(text, '\x01', sizeof text);
    text[sizeof text - 1] = '\0';
    bytes = log_format_line(line, 0, LOG_LEVEL_INFO, text);
    assert_true(bytes <= LOG_LINE_BYTES_MAX && line[bytes - 1] == '\n');
    memset(text, 'x', sizeof text - 1);
    bytes = log_format_line(line, 0, LOG_LEVEL_INFO, text);
    assert_true(bytes <= LOG_LINE_BYTES_MAX && line[bytes - 1] == '\n');
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_failure_has_a_row_and_every_error_a_failure),
        cmocka_unit_test(test_the_result_window_is_bounded),
        cmocka_unit_test(test_search_lists_follow_the_parameters_of_other_indexes),
        cmocka_unit_test(test_recall_targets_come_from_the_request_a_level_or_the_calibration),
        cmocka_unit_test(test_what_is_not_supported_is_refused),
        cmocka_unit_test(test_the_vector_field_is_named_or_the_only_one),
        cmocka_unit_test(test_output_fields_are_planned_as_the_contract_says),
        cmocka_unit_test(test_booleans_in_headers_have_six_spellings_each),
        cmocka_unit_test(test_log_lines_cannot_be_broken_by_what_they_quote),
    };

    return cmocka_run_group_tests_name("request", tests, NULL, NULL);
}
