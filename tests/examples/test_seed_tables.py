from seed_tables import markdown_table


def test_a_markdown_table_escapes_bars_and_aligns_numbers_to_the_right():
    table = markdown_table(["run", "rank"], [("a|b", 3), ("c", "-")])
    assert table == "| run | rank |\n|---|---:|\n| a\\|b | 3 |\n| c | - |"
    assert markdown_table(["a", "b"], [], texts=2) == "| a | b |\n|---|---|"
