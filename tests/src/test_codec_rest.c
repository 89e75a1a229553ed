#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/codec_rest.h"

static struct arena arena;

static int setup(void **state)
{
    (void)state;
    arena_init(&arena, 64 << 20);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    arena_release(&arena);
    return 0;
}

static enum failure_code search(const char *body, struct rest_search *out, struct failure *failure)
{
    memset(failure, 0, sizeof *failure);
    rest_read_search(body, strlen(body), &arena, out, failure);
    return failure->code;
}

static void expect_search(const char *body, enum failure_code code)
{
    struct rest_search out;
    struct failure failure;
    enum failure_code found = search(body, &out, &failure);

    if (found != code)
        fail_msg("%s: wanted failure %d, found %d: %s", body, code, found, failure.message);
}

static void test_a_search_body_is_read_with_its_defaults(void **state)
{
    struct rest_search out;
    struct failure failure;

    (void)state;
    assert_int_equal(search("{\"collectionName\":\"c\",\"data\":[[1,2]]}", &out, &failure), 0);
    assert_string_equal(out.target.collection, "c");
    assert_null(out.target.database);
    assert_int_equal(out.request.limit, 100);
    assert_int_equal(out.request.offset, 0);
    assert_false(out.request.output.given);
    assert_true(out.data.given);
}

static void test_keys_match_in_any_case_and_the_exact_one_wins(void **state)
{
    struct rest_search out;
    struct failure failure;

    (void)state;
    assert_int_equal(search("{\"COLLECTIONNAME\":\"c\",\"data\":[],\"LIMIT\":7}", &out, &failure),
                     0);
    assert_string_equal(out.target.collection, "c");
    assert_int_equal(out.request.limit, 7);
    assert_int_equal(
        search("{\"collectionName\":\"c\",\"data\":[],\"limit\":5,\"Limit\":9}", &out, &failure),
        0);
    assert_int_equal(out.request.limit, 5);
    assert_int_equal(
        search("{\"collectionName\":\"c\",\"data\":[],\"limit\":5,\"limit\":9}", &out, &failure),
        0);
    assert_int_equal(out.request.limit, 9);
    /* data is read from the raw text in Milvus: its case counts. */
    expect_search("{\"collectionName\":\"c\",\"Data\":[[1]]}", FAILURE_MISSING);
}

static void test_null_is_absent_and_unknown_keys_are_ignored(void **state)
{
    struct rest_search out;
    struct failure failure;

    (void)state;
    assert_int_equal(search("{\"collectionName\":\"c\",\"data\":[[1]],\"limit\":null,"
                            "\"outputFields\":null,\"idType\":{\"a\":[1,2,{}]},\"vector\":7}",
                            &out, &failure),
                     0);
    assert_int_equal(out.request.limit, 100);
    assert_false(out.request.output.given);
    expect_search("{\"collectionName\":null,\"data\":[[1]]}", FAILURE_MISSING);
}

static void test_bodies_that_are_not_json_objects_are_1801(void **state)
{
    static const char *const bodies[] = {
        "",
        "[]",
        "7",
        "{\"collectionName\":\"c\",}",
        "{}x",
        "{\"a\":1",
        "\"c\"",
        "{\"collectionName\":7,\"data\":[]}",
        "{\"\xff\":1}",
        "{\"a\":\"\\ud800\"}",
        "{\"collectionName\":\"c\",\"data\":[],\"limit\":\"5\"}",
        "{\"collectionName\":\"c\",\"data\":[],\"limit\":1.5}",
        "{\"collectionName\":\"c\",\"data\":[],\"limit\":4294967296}",
        "{\"collectionName\":\"c\",\"data\":[],\"outputFields\":\"a\"}",
        "{\"collectionName\":\"c\",\"data\":[],\"outputFields\":[1]}",
        "{\"collectionName\":\"c\",\"data\":[],\"strictGroupSize\":1}",
    };

    (void)state;
    for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++)
        expect_search(bodies[i], FAILURE_JSON);
}

static void test_missing_or_empty_required_keys_are_1802(void **state)
{
    struct rest_search out;
    struct failure failure;

    (void)state;
    expect_search("{}", FAILURE_MISSING);
    expect_search("{\"collectionName\":\"\",\"data\":[]}", FAILURE_MISSING);
    assert_int_equal(search("{\"collectionName\":\"c\"}", &out, &failure), FAILURE_MISSING);
    assert_non_null(strstr(failure.message, "missing required parameters"));
    assert_non_null(strstr(failure.message, "'Data'"));
}

static enum failure_code params(const char *text, struct search_tuning *out,
                                struct failure *failure)
{
    struct rest_search read;
    char body[1024];

    snprintf(body, sizeof body, "{\"collectionName\":\"c\",\"data\":[],\"searchParams\":%s}", text);
    if (search(body, &read, failure) == FAILURE_NONE)
        rest_read_search_params(&read.search_params, &arena, out, failure);
    return failure->code;
}

static void test_search_parameters_are_read_flat_and_nested(void **state)
{
    struct search_tuning out;
    struct failure failure;

    (void)state;
    assert_int_equal(
        params("{\"ef\":64,\"params\":{\"search_list\":\"200\",\"unknown\":[1]}}", &out, &failure),
        0);
    assert_int_equal(out.ef, 64);
    assert_int_equal(out.search_list, 200);
    assert_int_equal(params("{\"metricType\":\"L2\",\"metric_type\":\"COSINE\"}", &out, &failure),
                     0);
    assert_string_equal(out.metric_type, "COSINE");
    assert_int_equal(params("{\"ef\":64,\"params\":{\"ef\":\"64\"}}", &out, &failure), 0);
    assert_int_equal(params("{\"params\":{\"radius\":0.5}}", &out, &failure), 0);
    assert_string_equal(out.range, "radius");
    assert_int_equal(params("{\"recall_target\":\"0.95\",\"exact_scores\":true,\"params\":"
                            "{\"explain\":\"true\",\"reads_max\":7,\"beamwidth\":3}}",
                            &out, &failure),
                     0);
    assert_true(out.recall_target == 0.95 && out.exact_scores && out.explain);
    assert_int_equal(out.reads_max, 7);
    assert_int_equal(out.beam_width, 3);
    assert_int_equal(params("{\"explain\":false,\"recall_target\":null}", &out, &failure), 0);
    assert_true(out.recall_target == 0 && !out.exact_scores && !out.explain);
}

static void test_bad_search_parameters_are_refused(void **state)
{
    static const struct {
        const char *text;
        enum failure_code code;
        const char *part;
    } cases[] = {
        {"{\"ef\":64,\"params\":{\"ef\":65}}", FAILURE_INVALID_PARAMETER,
         "ambiguous parameter: ef"},
        {"{\"params\":[]}", FAILURE_INVALID_PARAMETER, "searchParams.params must be a dict"},
        {"{\"nprobe\":32.0}", FAILURE_INVALID_PARAMETER, "should be integer"},
        {"{\"nprobe\":\"x\"}", FAILURE_INVALID_PARAMETER, "should be integer"},
        {"{\"nprobe\":-1}", FAILURE_INVALID_PARAMETER, "range [1, 65536]"},
        {"{\"level\":11}", FAILURE_INVALID_PARAMETER, "range [1, 10]"},
        {"{\"radius\":\"x\"}", FAILURE_INVALID_PARAMETER, "radius"},
        {"{\"recall_target\":1}", FAILURE_INVALID_PARAMETER, "range [0.5, 0.9999]"},
        {"{\"recall_target\":0.49}", FAILURE_INVALID_PARAMETER, "recall_target"},
        {"{\"recall_target\":\"0.9x\"}", FAILURE_INVALID_PARAMETER, "should be a number"},
        {"{\"recall_target\":\"\"}", FAILURE_INVALID_PARAMETER, "should be a number"},
        {"{\"recall_target\":[0.9]}", FAILURE_INVALID_PARAMETER, "should be a number"},
        {"{\"recall_target\":0.9,\"search_list\":10}", FAILURE_INVALID_PARAMETER,
         "recall_target and search_list"},
        {"{\"recall_target\":0.9,\"params\":{\"level\":2}}", FAILURE_INVALID_PARAMETER,
         "recall_target and level"},
        {"{\"explain\":1}", FAILURE_INVALID_PARAMETER, "should be true or false"},
        {"{\"exact_scores\":\"yes\"}", FAILURE_INVALID_PARAMETER, "exact_scores"},
        {"{\"reads_max\":0}", FAILURE_INVALID_PARAMETER, "reads_max"},
        {"7", FAILURE_JSON, "searchParams"},
    };
    struct search_tuning out;
    struct failure failure;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(params(cases[i].text, &out, &failure), cases[i].code);
        if (!strstr(failure.message, cases[i].part))
            fail_msg("%s: %s", cases[i].text, failure.message);
    }
}

static enum failure_code queries(const char *data, enum field_type type, uint32_t dim,
                                 struct search_request *out, struct failure *failure)
{
    struct rest_search read;
    char body[1024];

    snprintf(body, sizeof body, "{\"data\":%s,\"collectionName\":\"c\"}", data);
    memset(out, 0, sizeof *out);
    if (search(body, &read, failure) == FAILURE_NONE)
        rest_read_queries(&read.data, type, dim, &arena, out, failure);
    return failure->code;
}

static void test_query_vectors_are_read_by_the_type_of_the_field(void **state)
{
    struct search_request out;
    struct failure failure;

    (void)state;
    assert_int_equal(queries("[[1,2.5,-3e-1],[0,0,0]]", FIELD_FLOAT_VECTOR, 3, &out, &failure), 0);
    assert_int_equal(out.query_count, 2);
    assert_true(out.queries[0][1] == 2.5f && out.queries[0][2] == -0.3f);
    assert_int_equal(queries("[[-128,127]]", FIELD_INT8_VECTOR, 2, &out, &failure), 0);
    assert_true(out.queries[0][0] == -128.0f);
    /* binary16 1.0, -2.0; bfloat16 1.0, -2.0 */
    assert_int_equal(queries("[\"ADwAwA==\"]", FIELD_FLOAT16_VECTOR, 2, &out, &failure), 0);
    assert_true(out.queries[0][0] == 1.0f && out.queries[0][1] == -2.0f);
    assert_int_equal(queries("[\"gD8AwA==\"]", FIELD_BFLOAT16_VECTOR, 2, &out, &failure), 0);
    assert_true(out.queries[0][0] == 1.0f && out.queries[0][1] == -2.0f);
    assert_int_equal(queries("[[1,2]]", FIELD_FLOAT16_VECTOR, 2, &out, &failure), 0);
    assert_int_equal(queries("[]", FIELD_FLOAT_VECTOR, 2, &out, &failure), 0);
    assert_int_equal(out.query_count, 0);
}

static void test_bad_query_vectors_are_1801(void **state)
{
    static const struct {
        const char *data;
        enum field_type type;
        const char *part;
    } cases[] = {
        {"[[1,2,3]]", FIELD_FLOAT_VECTOR, "dimension: 2, but length of []float: 3"},
        {"[[1,2,3,4,5]]", FIELD_FLOAT_VECTOR, "dimension: 2, but length of []float: 5"},
        {"[[1]]", FIELD_FLOAT_VECTOR, "dimension: 2, but length of []float: 1"},
        {"[[]]", FIELD_FLOAT_VECTOR, "length of []float: 0"},
        {"[1,2]", FIELD_FLOAT_VECTOR, "array of vectors"},
        {"7", FIELD_FLOAT_VECTOR, "array of vectors"},
        {"[[1,\"2\"]]", FIELD_FLOAT_VECTOR, "byte"},
        {"[[1,1e999]]", FIELD_FLOAT_VECTOR, "float32"},
        {"[[1,1e39]]", FIELD_FLOAT_VECTOR, "float32"},
        {"[[1,128]]", FIELD_INT8_VECTOR, "Int8Vector"},
        {"[[1,0.5]]", FIELD_INT8_VECTOR, "Int8Vector"},
        {"[\"ADwAwAA8\"]", FIELD_FLOAT16_VECTOR, "dimension"},
        {"[\"AHwAPA==\"]", FIELD_FLOAT16_VECTOR, "finite"},
        {"[\"x\"]", FIELD_FLOAT_VECTOR, "string"},
    };
    struct search_request out;
    struct failure failure;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(queries(cases[i].data, cases[i].type, 2, &out, &failure), FAILURE_JSON);
        if (!strstr(failure.message, cases[i].part))
            fail_msg("%s: %s", cases[i].data, failure.message);
    }
}

static enum failure_code keys(const char *id, enum field_type type, struct get_request *out,
                              struct failure *failure)
{
    struct rest_get read;
    char body[1024];

    snprintf(body, sizeof body, "{\"id\":%s,\"collectionName\":\"c\"}", id);
    memset(failure, 0, sizeof *failure);
    memset(out, 0, sizeof *out);
    if (rest_read_get(body, strlen(body), &arena, &read, failure) == 0)
        rest_read_keys(&read.id, type, &arena, out, failure);
    return failure->code;
}

static void test_keys_are_numbers_or_strings_and_exact(void **state)
{
    struct get_request out;
    struct failure failure;

    (void)state;
    assert_int_equal(keys("445127262333941301", FIELD_INT64, &out, &failure), 0);
    assert_true(out.key_count == 1 && out.keys[0].number == INT64_C(445127262333941301));
    assert_int_equal(
        keys("[\"-9223372036854775808\",9223372036854775807, 0]", FIELD_INT64, &out, &failure), 0);
    assert_true(out.key_count == 3 && out.keys[0].number == INT64_MIN &&
                out.keys[1].number == INT64_MAX && out.keys[2].number == 0);
    assert_int_equal(keys("[]", FIELD_INT64, &out, &failure), 0);
    assert_int_equal(out.key_count, 0);
    assert_int_equal(keys("[\"a\\u00e9\", 12]", FIELD_VARCHAR, &out, &failure), 0);
    assert_int_equal(out.keys[0].text_bytes, 3);
    assert_memory_equal(out.keys[0].text, "a\xc3\xa9", 3);
    assert_int_equal(out.keys[1].text_bytes, 2);
    assert_memory_equal(out.keys[1].text, "12", 2);
    assert_int_equal(keys("\"abc\"", FIELD_INT64, &out, &failure), FAILURE_BAD_KEY);
    assert_int_equal(keys("1.5", FIELD_INT64, &out, &failure), FAILURE_BAD_KEY);
    assert_int_equal(keys("[true]", FIELD_INT64, &out, &failure), FAILURE_BAD_KEY);
    assert_int_equal(keys("9223372036854775808", FIELD_INT64, &out, &failure), FAILURE_BAD_KEY);
    assert_int_equal(keys("null", FIELD_INT64, &out, &failure), FAILURE_MISSING);
}

static void expect_text(struct json_writer *writer, const char *wanted)
{
    const char *text;
    size_t bytes;
    struct error err = ERROR_INIT;

    if (json_writer_finish(writer, &text, &bytes, &err) < 0)
        fail_msg("%s", err.message);
    assert_string_equal(text, wanted);
    json_writer_reset(writer);
}

static void test_vectors_and_arrays_are_written_as_the_wire_shows_them(void **state)
{
    static const float floats[] = {0.1f, -2.0f};
    static const uint8_t small[] = {0, 255};
    static const uint16_t halves[] = {0x3c00, 0xc000};
    struct json_writer writer;
    struct schema_field field = {.type = FIELD_VARCHAR, .default_json = (char[]){"\"x\""}};

    (void)state;
    json_writer_init(&writer, 1 << 20);
    rest_write_vector(&writer, FIELD_FLOAT_VECTOR, ELEMENT_F32, 2, floats);
    expect_text(&writer, "[0.1,-2]");
    rest_write_vector(&writer, FIELD_FLOAT_VECTOR, ELEMENT_U8, 2, small);
    expect_text(&writer, "[0,255]");
    rest_write_vector(&writer, FIELD_FLOAT_VECTOR, ELEMENT_F16, 2, halves);
    expect_text(&writer, "[1,-2]");
    rest_write_vector(&writer, FIELD_INT8_VECTOR, ELEMENT_I8, 2, small);
    expect_text(&writer, "\"AP8=\"");
    rest_write_vector(&writer, FIELD_FLOAT16_VECTOR, ELEMENT_F16, 2, halves);
    expect_text(&writer, "\"ADwAwA==\"");
    rest_write_array(&writer, FIELD_INT64, "[1, 2]", 6);
    expect_text(&writer, "{\"Data\":{\"LongData\":{\"data\":[1, 2]}}}");
    rest_write_array(&writer, FIELD_VARCHAR, "[ ]", 3);
    expect_text(&writer, "{\"Data\":{\"StringData\":{}}}");
    rest_write_default(&writer, &field);
    expect_text(&writer, "{\"Data\":{\"StringData\":\"x\"}}");
    rest_write_int64(&writer, INT64_C(445127262333941301), true);
    expect_text(&writer, "\"445127262333941301\"");
    json_writer_release(&writer);
}

static void test_a_failure_is_an_envelope_with_code_and_message(void **state)
{
    struct failure failure = {0};
    size_t bytes;
    char *text;

    (void)state;
    failure_set(&failure, FAILURE_COLLECTION_NOT_FOUND, "can't find \"%s\"", "x\n");
    failure_set(&failure, FAILURE_INTERNAL, "too late");
    text = rest_write_failure(&failure, &bytes);
    assert_string_equal(text, "{\"code\":100,\"message\":\"can't find \\\"x\\n\\\"\"}");
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_search_body_is_read_with_its_defaults, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_keys_match_in_any_case_and_the_exact_one_wins, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_null_is_absent_and_unknown_keys_are_ignored, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_bodies_that_are_not_json_objects_are_1801, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_missing_or_empty_required_keys_are_1802, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_search_parameters_are_read_flat_and_nested, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_bad_search_parameters_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_query_vectors_are_read_by_the_type_of_the_field, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_bad_query_vectors_are_1801, setup, teardown),
        cmocka_unit_test_setup_teardown(test_keys_are_numbers_or_strings_and_exact, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_vectors_and_arrays_are_written_as_the_wire_shows_them,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_failure_is_an_envelope_with_code_and_message, setup,
                                        teardown),
    };

    return cmocka_run_group_tests_name("codec_rest", tests, NULL, NULL);
}
