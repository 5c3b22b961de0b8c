"""Operations with one reduction order: a row's bits never depend on the rows around it."""
