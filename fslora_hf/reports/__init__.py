"""Results for people: tables, pages, figures, the leaderboard. Needs no torch."""
