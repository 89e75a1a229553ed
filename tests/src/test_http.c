#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <arpa/inet.h>
#include <cmocka.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/http.h"

static void echo(struct http_exchange *exchange)
{
    size_t bytes;
    const char *body = http_body(exchange, &bytes);
    char *copy = malloc(bytes + 1);

    memcpy(copy, body, bytes + 1);
    http_reply(exchange, 200, HTTP_JSON, copy, bytes);
}

static void finish(struct http_exchange *exchange)
{
    char *text = http_call(exchange);

    http_reply_header(exchange, "Retry-After", "1");
    http_reply_static(exchange, 200, HTTP_TEXT, text);
}

static void *continue_soon(void *exchange)
{
    usleep(2000);
    http_continue(exchange, finish);
    return NULL;
}

static void *continue_late(void *exchange)
{
    usleep(300000);
    http_continue(exchange, finish);
    return NULL;
}

static void *reply_elsewhere(void *exchange)
{
    http_reply_static(exchange, 200, HTTP_TEXT, "elsewhere");
    return NULL;
}

static void defer_to(struct http_exchange *exchange, void *(*fn)(void *))
{
    static char text[] = "continued";
    pthread_t thread;

    http_set_call(exchange, text);
    http_defer(exchange);
    pthread_create(&thread, NULL, fn, exchange);
    pthread_detach(thread);
}

static void soon(struct http_exchange *exchange)
{
    defer_to(exchange, continue_soon);
}

static void late(struct http_exchange *exchange)
{
    defer_to(exchange, continue_late);
}

static void elsewhere(struct http_exchange *exchange)
{
    defer_to(exchange, reply_elsewhere);
}

static void at_once(struct http_exchange *exchange)
{
    http_set_call(exchange, (char[]){"unused"});
    http_defer(exchange);
    http_reply_static(exchange, 200, HTTP_TEXT, "at once");
}

static void silent(struct http_exchange *exchange)
{
    (void)exchange;
}

static const struct http_route routes[] = {
    {HTTP_POST, "/echo", false, echo},       {HTTP_POST, "/soon", false, soon},
    {HTTP_POST, "/late", false, late},       {HTTP_POST, "/elsewhere", false, elsewhere},
    {HTTP_POST, "/at_once", false, at_once}, {HTTP_GET, "/silent", false, silent},
};

static struct http_server *start(void)
{
    static const char *const origins[] = {"https://friend.example"};
    const struct http_options options = {
        .listen = "127.0.0.1:0",
        .threads = 2,
        .connection_max = 64,
        .body_memory_max = 1 << 20,
        .origins = origins,
        .origin_count = 1,
        .routes = routes,
        .route_count = sizeof routes / sizeof routes[0],
    };
    struct http_server *server = NULL;
    struct error err = ERROR_INIT;

    if (http_server_start(&options, &server, &err) < 0)
        fail_msg("%s", err.message);
    return server;
}

static int dial(const struct http_server *server)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct timeval patience = {.tv_sec = 20};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    address.sin_port = htons((uint16_t)atoi(strrchr(http_server_address(server), ':') + 1));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void say(int fd, const char *method, const char *path, const char *headers, const char *body)
{
    char text[8192];
    int bytes = snprintf(text, sizeof text,
                         "%s %s HTTP/1.1\r\nHost: localhost\r\n%s"
                         "Content-Length: %zu\r\n\r\n%s",
                         method, path, headers, strlen(body), body);

    assert_int_equal(send(fd, text, (size_t)bytes, MSG_NOSIGNAL), bytes);
}

/* One whole answer with a Content-Length; its body in `body`. The status. */
static int hear(int fd, char *head, size_t head_bytes, char *body, size_t body_bytes)
{
    size_t got = 0;
    size_t length;
    char *end = NULL;

    while (!end) {
        ssize_t n = recv(fd, head + got, head_bytes - 1 - got, 0);

        if (n <= 0)
            return 0;
        got += (size_t)n;
        head[got] = '\0';
        end = strstr(head, "\r\n\r\n");
    }
    length = strtoul(strstr(head, "Content-Length: ") + 16, NULL, 10);
    assert_true(length < body_bytes);
    got -= (size_t)(end + 4 - head);
    memcpy(body, end + 4, got);
    end[4] = '\0';
    while (got < length) {
        ssize_t n = recv(fd, body + got, length - got, 0);

        assert_true(n > 0);
        got += (size_t)n;
    }
    body[length] = '\0';
    return atoi(head + 9);
}

static void expect(int fd, int status, const char *wanted)
{
    char head[4096];
    char body[8192];

    assert_int_equal(hear(fd, head, sizeof head, body, sizeof body), status);
    assert_string_equal(body, wanted);
}

static void test_handlers_answer_now_later_and_from_other_threads(void **state)
{
    struct http_server *server = start();
    int fd = dial(server);

    (void)state;
    for (int i = 0; i < 200; i++) {
        say(fd, "POST", "/echo", "", "{\"a\":1}");
        expect(fd, 200, "{\"a\":1}");
        say(fd, "POST", "/elsewhere", "", "x");
        expect(fd, 200, "elsewhere");
        say(fd, "POST", "/at_once", "", "x");
        expect(fd, 200, "at once");
    }
    say(fd, "POST", "/soon", "", "x");
    expect(fd, 200, "continued");
    say(fd, "POST", "/none", "", "x");
    expect(fd, 404, "404 page not found");
    say(fd, "POST", "/echo", "", "");
    expect(fd, 200, "");
    say(fd, "GET", "/silent", "", "");
    expect(fd, 500, "{\"code\":5,\"message\":\"service internal error\"}");
    close(fd);
    http_server_stop(server);
}

static void *many(void *context)
{
    int fd = dial(context);

    for (int i = 0; i < 50; i++) {
        char body[64];

        snprintf(body, sizeof body, "%d", i);
        say(fd, "POST", "/echo", "", body);
        expect(fd, 200, body);
        say(fd, "POST", "/soon", "", "x");
        expect(fd, 200, "continued");
    }
    close(fd);
    return NULL;
}

static void test_connections_do_not_mix(void **state)
{
    struct http_server *server = start();
    struct http_counters counters;
    pthread_t threads[8];

    (void)state;
    for (size_t i = 0; i < 8; i++)
        pthread_create(&threads[i], NULL, many, server);
    for (size_t i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    http_server_counters(server, &counters);
    assert_int_equal(counters.connections, 8);
    assert_int_equal(counters.requests, 800);
    assert_int_equal(counters.requests_refused, 0);
    http_server_stop(server);
}

static void test_draining_answers_what_is_under_way_and_says_close(void **state)
{
    struct http_server *server = start();
    int busy = dial(server);
    int idle = dial(server);
    char head[4096];
    char body[64];

    (void)state;
    say(idle, "POST", "/echo", "", "x");
    expect(idle, 200, "x");
    say(busy, "POST", "/late", "", "x");
    usleep(50000);
    assert_int_equal(http_server_drain(server, 10000), 0);
    assert_int_equal(hear(busy, head, sizeof head, body, sizeof body), 200);
    assert_string_equal(body, "continued");
    assert_non_null(strstr(head, "Connection: close"));
    assert_non_null(strstr(head, "Retry-After: 1"));
    assert_int_equal(hear(idle, head, sizeof head, body, sizeof body), 0);
    close(busy);
    close(idle);
    http_server_stop(server);
}

static void test_clients_that_leave_while_work_runs_do_not_hold_up_the_end(void **state)
{
    struct http_server *server = start();

    (void)state;
    for (int i = 0; i < 16; i++) {
        int fd = dial(server);

        say(fd, "POST", i % 2 ? "/late" : "/soon", "", "x");
        close(fd);
    }
    usleep(100000);
    http_server_stop(server);
}

static void test_bodies_share_a_memory_limit(void **state)
{
    struct http_server *server = start();
    int fd = dial(server);
    char head[4096];
    char body[1024];
    char *large = malloc(3 << 20);
    char text[128];
    int bytes = snprintf(text, sizeof text,
                         "POST /echo HTTP/1.1\r\nHost: localhost\r\n"
                         "Content-Length: %d\r\n\r\n",
                         3 << 20);

    (void)state;
    memset(large, ' ', 3 << 20);
    assert_int_equal(send(fd, text, (size_t)bytes, MSG_NOSIGNAL), bytes);
    assert_int_equal(send(fd, large, 3 << 20, MSG_NOSIGNAL), 3 << 20);
    assert_int_equal(hear(fd, head, sizeof head, body, sizeof body), 200);
    assert_non_null(strstr(body, "\"code\":3"));
    close(fd);
    fd = dial(server);
    say(fd, "POST", "/echo", "", "x");
    expect(fd, 200, "x");
    close(fd);
    free(large);
    http_server_stop(server);
}

static void test_listed_origins_get_cors_headers_and_others_403(void **state)
{
    struct http_server *server = start();
    int fd = dial(server);
    char head[4096];
    char body[1024];

    (void)state;
    say(fd, "POST", "/echo", "Origin: https://friend.example\r\n", "x");
    assert_int_equal(hear(fd, head, sizeof head, body, sizeof body), 200);
    assert_non_null(strstr(head, "Access-Control-Allow-Origin: https://friend.example\r\n"));
    say(fd, "POST", "/echo", "", "x");
    assert_int_equal(hear(fd, head, sizeof head, body, sizeof body), 200);
    assert_null(strstr(head, "Access-Control"));
    say(fd, "POST", "/echo", "Origin: https://friend.example.evil\r\n", "x");
    assert_int_equal(hear(fd, head, sizeof head, body, sizeof body), 403);
    assert_null(strstr(head, "Access-Control"));
    close(fd);
    http_server_stop(server);
}

static void test_listen_addresses_are_parsed(void **state)
{
    static const struct {
        const char *text;
        const char *host; /* NULL: refused */
        uint16_t port;
        bool loopback;
    } cases[] = {
        {"127.0.0.1:19530", "127.0.0.1", 19530, true},
        {"127.8.9.1:1", "127.8.9.1", 1, true},
        {"localhost:0", "127.0.0.1", 0, true},
        {"[::1]:65535", "::1", 65535, true},
        {"0.0.0.0:80", "0.0.0.0", 80, false},
        {"[::]:80", "::", 80, false},
        {"10.0.0.1:80", "10.0.0.1", 80, false},
        {"127.0.0.1", NULL, 0, false},
        {"127.0.0.1:", NULL, 0, false},
        {"127.0.0.1:65536", NULL, 0, false},
        {"127.0.0.1:+1", NULL, 0, false},
        {"127.0.0.1:1x", NULL, 0, false},
        {":80", NULL, 0, false},
        {"::1:80", NULL, 0, false},
        {"[127.0.0.1]:80", NULL, 0, false},
        {"name:80", NULL, 0, false},
        {"", NULL, 0, false},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = ERROR_INIT;
        char host[64];
        uint16_t port;
        bool loopback;
        int rc = http_parse_address(cases[i].text, host, sizeof host, &port, &loopback, &err);

        if ((rc == 0) != (cases[i].host != NULL))
            fail_msg("\"%s\": %d %s", cases[i].text, rc, err.message);
        if (rc < 0) {
            assert_int_equal(err.code, ERR_INVALID);
            continue;
        }
        assert_string_equal(host, cases[i].host);
        assert_int_equal(port, cases[i].port);
        assert_int_equal(loopback, cases[i].loopback);
    }
}

static void test_a_taken_port_is_busy_and_says_what_to_do(void **state)
{
    struct http_server *server = start();
    struct http_options options = {.listen = http_server_address(server), .connection_max = 1};
    struct http_server *second = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(http_server_start(&options, &second, &err), -1);
    assert_int_equal(err.code, ERR_BUSY);
    assert_non_null(strstr(err.message, http_server_address(server)));
    assert_non_null(strstr(err.message, "--listen"));
    http_server_stop(server);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_handlers_answer_now_later_and_from_other_threads),
        cmocka_unit_test(test_connections_do_not_mix),
        cmocka_unit_test(test_draining_answers_what_is_under_way_and_says_close),
        cmocka_unit_test(test_clients_that_leave_while_work_runs_do_not_hold_up_the_end),
        cmocka_unit_test(test_bodies_share_a_memory_limit),
        cmocka_unit_test(test_listed_origins_get_cors_headers_and_others_403),
        cmocka_unit_test(test_listen_addresses_are_parsed),
        cmocka_unit_test(test_a_taken_port_is_busy_and_says_what_to_do),
    };

    return cmocka_run_group_tests_name("http", tests, NULL, NULL);
}
